"""POST /v1/completions.

Knows nothing of how tokens are made, nor of how answers are written.
"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from shuteye.server.admission import ModelRoute, require_task
from shuteye.server.answer import answer_stream, answer_whole, new_request_id
from shuteye.server.context import Context, ServerContext
from shuteye.server.generation import Job, Prompt, require_room
from shuteye.server.prompts import prompt_of
from shuteye.server.protocol.completions import DEFAULT_MAX_TOKENS, CompletionBody, CompletionShape

router = APIRouter(route_class=ModelRoute)


@router.post("/v1/completions", response_model=None)
async def completions(request: Request, body: CompletionBody, context: Context) -> Response:
    """Continues one or more prompts, whole or streamed."""
    require_task(context, "generate", request.url.path)
    model = context.served_name(body.model)
    job = await _job(body, context)
    shape = CompletionShape(
        tokenizer=context.engine.tokenizer,
        wants_logprobs=body.logprobs is not None,
        num_choices=job.params.n,
        echoed=job.prompts if body.echo else None,
    )
    if body.stream:
        return await answer_stream(request, context, job, shape=shape, model=model, include_usage=body.include_usage)
    return await answer_whole(request, context, job, shape=shape, model=model)


async def _job(body: CompletionBody, context: ServerContext) -> Job:
    info = context.engine.info
    prompts = await _prompts(body, context)
    longest = max(len(prompt.token_ids) for prompt in prompts)
    max_tokens = body.max_tokens
    if max_tokens is None:
        max_tokens = max(1, min(DEFAULT_MAX_TOKENS, info.max_model_len - longest))
    params = body.sampling_params(info.default_sampling, max_tokens=max_tokens, logprobs=body.logprobs)
    require_room(longest, max_tokens, info.max_model_len)
    return Job(new_request_id("cmpl"), prompts, params)


async def _prompts(body: CompletionBody, context: ServerContext) -> tuple[Prompt, ...]:
    return tuple(
        [
            await prompt_of(
                context.engine.tokenizer,
                given,
                vocab_size=context.engine.info.vocab_size,
                add_special_tokens=body.add_special_tokens is not False,
                want_text=body.echo is True,
            )
            for given in body.prompts
        ]
    )
