"""POST /v1/responses.

Knows nothing of how tokens are made, nor of how answers are written. Responses are not stored.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import ValidationError

from shuteye.errors import InvalidRequest
from shuteye.request import SamplingParams
from shuteye.server.admission import ModelRoute, require_task
from shuteye.server.answer import new_request_id
from shuteye.server.chat_job import ChatJob, chat_job
from shuteye.server.context import Context, ServerContext
from shuteye.server.errors import invalid_request
from shuteye.server.protocol.responses import ResponsesBody
from shuteye.server.response_answer import ResponseAnswer, answer_response, stream_response

router = APIRouter(route_class=ModelRoute)


@router.post("/v1/responses", response_model=None)
async def responses(request: Request, body: ResponsesBody, context: Context) -> Response:
    """Answers a conversation, whole or streamed, in the shape of OpenAI's Responses API."""
    require_task(context, "generate", request.url.path)
    model = context.served_name(body.model)
    chat = await _chat_job(context, body)
    about = _about(body, model, chat.job.params)
    answer = ResponseAnswer(chat, about, one_call=body.parallel_tool_calls is False)
    if body.stream:
        return await stream_response(request, context, chat, answer)
    return await answer_response(request, context, chat, answer)


async def _chat_job(context: ServerContext, body: ResponsesBody) -> ChatJob:
    try:
        return await chat_job(context, new_request_id("resp"), body.as_chat())
    except ValidationError as error:
        raise invalid_request([{**one, "loc": ("body", *one["loc"])} for one in error.errors()]) from error
    except InvalidRequest as error:
        raise InvalidRequest(error.message, param=_PARAMS.get(error.param or "", error.param)) from error


_PARAMS = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text",
    "reasoning_effort": "reasoning",
}
"""Fields of the chat route, and what they are called here."""


def _about(body: ResponsesBody, model: str, params: SamplingParams) -> dict[str, Any]:
    """What a response repeats of its request."""
    given = body.model_dump(by_alias=True, exclude_none=True)
    return {
        "model": model,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "tools": given.get("tools", []),
        "tool_choice": given.get("tool_choice", "auto"),
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "text": given.get("text") or {"format": {"type": "text"}},
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "truncation": "disabled",
        "previous_response_id": None,
        "background": False,
        "store": False,
        "metadata": body.metadata or {},
    }
