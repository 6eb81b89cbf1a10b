"""POST …/render: the prompt that a request becomes, and how its tokens would be chosen; works while asleep.

The shape is that of vLLM's requests with token ids (`GenerateRequest`), with the prompt's text as well.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from fastapi import APIRouter, Request, Response
from msgspec import Struct

from shuteye.server.context import Context, ServerContext
from shuteye.server.generation.answer import new_request_id
from shuteye.server.generation.run import Job
from shuteye.server.http.admission import require_task
from shuteye.server.http.answers import JsonAnswer
from shuteye.server.http.auth import InferenceRoute
from shuteye.server.openai.chat import ChatBody, chat_job
from shuteye.server.openai.completions import CompletionBody, completion_job
from shuteye.server.openai.responses import ResponsesBody, response_job
from shuteye.tasks.generate.requests import SamplingParams
from shuteye.tokenizer import LONG_TEXT, Tokenizer


class RenderAnswer(Struct, kw_only=True):
    """A prompt, and what would be asked of the engine. `max_tokens` is what the context leaves, if nobody said."""

    request_id: str
    token_ids: Sequence[int]
    text: str
    sampling_params: SamplingParams
    model: str
    stream: bool
    cache_salt: str | None
    priority: int
    token_offsets: None = None
    features: None = None
    kv_transfer_params: None = None


async def rendered(context: ServerContext, job: Job, *, model: str, stream: bool | None) -> list[RenderAnswer]:
    """One answer for each prompt of a job."""
    answers = []
    for prompt in job.prompts:
        params = job.params
        if params.max_tokens is None:
            params = replace(params, max_tokens=context.engine.info.max_model_len - len(prompt.token_ids))
        answer = RenderAnswer(
            request_id=job.request_id,
            token_ids=prompt.token_ids,
            text=await _text(context.engine.tokenizer, prompt.token_ids),
            sampling_params=params,
            model=model,
            stream=stream is True,
            cache_salt=params.cache_salt,
            priority=params.priority,
        )
        answers.append(answer)
    return answers


async def _text(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    if len(token_ids) > LONG_TEXT:
        return await asyncio.to_thread(tokenizer.decode, token_ids, skip_special_tokens=False)
    return tokenizer.decode(token_ids, skip_special_tokens=False)


router = APIRouter(route_class=InferenceRoute)


@router.post("/v1/chat/completions/render", response_model=None)
async def render_chat_completion(request: Request, body: ChatBody, context: Context) -> Response:
    """The prompt that a conversation becomes."""
    require_task(context, "generate", request.url.path)
    model = context.served_name(body.model)
    job, _reading = await chat_job(context, new_request_id("chatcmpl"), body)
    (answer,) = await rendered(context, job, model=model, stream=body.stream)
    return JsonAnswer(answer)


@router.post("/v1/completions/render", response_model=None)
async def render_completion(request: Request, body: CompletionBody, context: Context) -> Response:
    """The prompts of a completion, a list even if there is one."""
    require_task(context, "generate", request.url.path)
    model = context.served_name(body.model)
    job = await completion_job(body, context)
    return JsonAnswer(await rendered(context, job, model=model, stream=body.stream))


@router.post("/v1/responses/render", response_model=None)
async def render_response(request: Request, body: ResponsesBody, context: Context) -> Response:
    """The prompt that a response's input becomes."""
    require_task(context, "generate", request.url.path)
    model = context.served_name(body.model)
    job, _reading = await response_job(context, body)
    (answer,) = await rendered(context, job, model=model, stream=body.stream)
    return JsonAnswer(answer)
