"""POST /v1/chat/completions.

Knows nothing of how tokens are made, nor of how answers are written.
"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from shuteye.server.admission import ModelRoute, require_task
from shuteye.server.answer import answer_stream, answer_whole, new_request_id
from shuteye.server.chat_job import ChatJob, chat_job
from shuteye.server.context import Context
from shuteye.server.protocol.chat import ChatBody
from shuteye.server.protocol.chat_shape import ChatShape
from shuteye.server.protocol.logprobs import TokenNames
from shuteye.server.protocol.tools import NamedToolChoice

router = APIRouter(route_class=ModelRoute)


@router.post("/v1/chat/completions", response_model=None)
async def chat_completions(request: Request, body: ChatBody, context: Context) -> Response:
    """Answers a conversation, whole or streamed."""
    require_task(context, "generate", request.url.path)
    model = context.served_name(body.model)
    chat = await chat_job(context, new_request_id("chatcmpl"), body)
    shape = _shape(body, chat, names=TokenNames(context.engine.tokenizer, body.return_tokens_as_token_ids is True))
    if body.stream:
        return await answer_stream(request, context, chat.job, shape=shape, model=model, usage_in=body.usage_in)
    return await answer_whole(request, context, chat.job, shape=shape, model=model)


def _shape(body: ChatBody, chat: ChatJob, *, names: TokenNames) -> ChatShape:
    return ChatShape(
        names=names,
        num_top=body.num_logprobs,
        reading=chat.reading,
        echo=chat.echo,
        named_call=isinstance(body.tool_choice, NamedToolChoice),
        one_call=body.parallel_tool_calls is False,
        show_reasoning=body.include_reasoning is not False,
        token_ids_of=chat.job.prompts[0] if body.return_token_ids else None,
    )
