"""POST /v1/chat/completions.

Knows nothing of how tokens are made, nor of how answers are written.
"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from shuteye.server.admission import ModelRoute, require_task
from shuteye.server.answer import answer_stream, answer_whole, new_request_id
from shuteye.server.context import Context, ServerContext
from shuteye.server.generation import Job, Prompt, require_room
from shuteye.server.prompts import encode, render_chat, require_tokens
from shuteye.server.protocol.chat import ChatBody, ChatShape

router = APIRouter(route_class=ModelRoute)


@router.post("/v1/chat/completions", response_model=None)
async def chat_completions(request: Request, body: ChatBody, context: Context) -> Response:
    """Answers a conversation, whole or streamed."""
    require_task(context, "generate", request.url.path)
    model = context.served_name(body.model)
    job = await _job(body, context)
    shape = ChatShape(context.engine.tokenizer, body.num_logprobs)
    if body.stream:
        return await answer_stream(request, context, job, shape=shape, model=model, include_usage=body.include_usage)
    return await answer_whole(request, context, job, shape=shape, model=model)


async def _job(body: ChatBody, context: ServerContext) -> Job:
    info = context.engine.info
    params = body.sampling_params(info.default_sampling, max_tokens=body.token_limit, logprobs=body.num_logprobs)
    tokenizer = context.engine.tokenizer
    text = await render_chat(
        tokenizer,
        body.messages,
        add_generation_prompt=body.add_generation_prompt is not False,
        template_kwargs=body.chat_template_kwargs or {},
    )
    token_ids = await encode(tokenizer, text, add_special_tokens=body.add_special_tokens is True)
    require_tokens(token_ids, param="messages")
    require_room(len(token_ids), params.max_tokens, info.max_model_len)
    return Job(new_request_id("chatcmpl"), (Prompt(token_ids),), params)
