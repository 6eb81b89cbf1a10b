"""POST /v1/responses: OpenAI's request, as the conversation that it stands for.

Nothing is stored: what refers to earlier responses is refused.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from shuteye.errors import InvalidRequest
from shuteye.server.context import Context, ServerContext
from shuteye.server.generation.answer import new_request_id
from shuteye.server.generation.run import Job
from shuteye.server.http.admission import ModelRoute, require_task
from shuteye.server.http.errors import invalid_request
from shuteye.server.openai.chat import ChatBody, chat_job
from shuteye.server.openai.fields import Many, one_message, settle_unsupported
from shuteye.server.openai.response_events import ResponseAnswer, ResponseInProgress, answer_response, stream_response
from shuteye.server.parsing.parser import ReadingPlan

HARMLESS = frozenset({"user", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"})
"""Fields that change nothing in what is generated."""

REFUSED: Mapping[str, tuple[object, ...]] = {
    "background": (False,), "conversation": (), "context_management": ([],), "include": ([],), "max_tool_calls": (),
    "previous_response_id": (), "prompt": (), "store": (False,), "top_logprobs": (0,), "truncation": ("disabled",),
    "moderation": (),
}  # fmt: skip
"""Fields that this server does nothing for, each with the values that ask for nothing; null is always one."""

_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens",
    "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "priority", "parallel_tool_calls",
    "chat_template_kwargs", "structured_outputs",
)  # fmt: skip


class _Part(BaseModel):
    """A part of a message's content; only text can be read. What an output carries beside its text is not needed."""

    model_config = ConfigDict(extra="ignore", strict=True)

    type: Literal["input_text", "output_text", "text", "reasoning_text"]
    text: str


def _as_parts(content: Any) -> Any:
    """A string is one part of text; with one form only, complaints name the very part that is wrong."""
    return [{"type": "input_text", "text": content}] if isinstance(content, str) else content


_Parts = Annotated[Many[_Part], BeforeValidator(_as_parts)]


class _Item(BaseModel):
    """One item of a conversation: a message, a call, its result, or earlier reasoning."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    id: str | None = None
    status: str | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: _Parts | None = None
    phase: str | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: _Parts | None = None
    summary: list[Any] | None = None
    encrypted_content: None = None

    @model_validator(mode="after")
    def _has_what_its_type_needs(self) -> _Item:
        needed = {
            "message": ("role", "content"),
            "function_call": ("call_id", "name", "arguments"),
            "function_call_output": ("call_id", "output"),
            "reasoning": (),
        }[self.type]
        missing = [name for name in needed if getattr(self, name) is None]
        if missing:
            raise InvalidRequest(f"An item of type '{self.type}' in input needs '{missing[0]}'.", param="input")
        return self


class _Function(BaseModel):
    """A function as this route describes it: flat."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _NamedFunction(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["function"]
    name: str


class _Format(BaseModel):
    """`text.format`, also flat."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class _Text(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: _Format | None = None
    verbosity: Literal["medium"] | None = None


class _Reasoning(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    effort: str | None = None
    summary: None = None
    generate_summary: None = None


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_obfuscation: bool | None = None  # it only pads events


def _as_items(given: Any) -> Any:
    """A string is what the user says."""
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


def _or_text(schema: dict[str, Any]) -> None:
    """Say in the OpenAPI document that a text will do in place of items."""
    items = dict(schema)
    schema.clear()
    schema["anyOf"] = [{"type": "string", "minLength": 1}, items]


class ResponsesBody(BaseModel):
    """The request, with some of vLLM's extra fields."""

    model_config = ConfigDict(extra="forbid", strict=True)

    input: Annotated[Many[_Item], BeforeValidator(_as_items)] = Field(min_length=1, json_schema_extra=_or_text)
    model: str | None = None
    instructions: str | None = None
    metadata: dict[str, str] | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    text: _Text | None = None
    reasoning: _Reasoning | None = None
    tools: Many[_Function] | None = None
    tool_choice: Literal["none", "auto", "required"] | _NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | Many[str] | None = None
    stop_token_ids: Many[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    priority: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None

    _choice_message = field_validator("tool_choice", mode="wrap")(
        one_message("'none', 'auto', 'required' or a function's name in an object")
    )

    @model_validator(mode="before")
    @classmethod
    def _settle(cls, body: Any) -> Any:
        if not isinstance(body, Mapping):
            return body
        kept = {}
        for name, value in body.items():
            if name in REFUSED and value is not None and value not in REFUSED[name]:
                raise InvalidRequest(
                    f"'{name}' is not supported by this server, which keeps no responses. Remove it, or send the whole "
                    "conversation as input.",
                    param=name,
                )
            if name not in REFUSED and name not in HARMLESS:
                kept[name] = value
        return settle_unsupported(kept, cls.model_fields, unsupported={})

    def as_chat(self) -> ChatBody:
        """The same request to the chat route.

        Raises:
            InvalidRequest: what only the chat's own validation finds.
        """
        fields: dict[str, Any] = {name: getattr(self, name) for name in _SAMPLING}
        fields |= {
            "model": self.model,
            "messages": self._messages(),
            "max_tokens": self.max_output_tokens,
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
            "tools": [_chat_tool(tool) for tool in self.tools] if self.tools else None,
            "tool_choice": self._chat_tool_choice(),
            "response_format": _response_format(self.text.format if self.text else None),
        }
        return ChatBody.model_validate({name: value for name, value in fields.items() if value is not None})

    def _chat_tool_choice(self) -> Any:
        if isinstance(self.tool_choice, _NamedFunction):
            return {"type": "function", "function": {"name": self.tool_choice.name}}
        return self.tool_choice

    def _messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        for item in self.input:
            _append(messages, item)
        return messages


def _append(messages: list[dict[str, Any]], item: _Item) -> None:
    """Add an item; what one answer consisted of, reasoning, words and calls, becomes one message again."""
    last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    if item.type == "function_call_output":
        messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _joined(item.output)})
    elif item.type == "message" and item.role != "assistant":
        messages.append({"role": item.role, "content": _joined(item.content)})
    elif item.type == "message":
        if last is None or "content" in last:
            messages.append(last := {"role": "assistant"})
        last["content"] = _joined(item.content)
    elif item.type == "function_call":
        if last is None:
            messages.append(last := {"role": "assistant"})
        function = {"name": item.name, "arguments": item.arguments}
        last.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})
    elif item.content:
        messages.append({"role": "assistant", "reasoning": _joined(item.content)})


def _joined(parts: Sequence[_Part] | None) -> str:
    return "\n".join(part.text for part in parts or ())


def _chat_tool(tool: _Function) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude={"type"})}


def _response_format(wanted: _Format | None) -> dict[str, Any] | None:
    if wanted is None:
        return None
    if wanted.json_schema is None:
        return {"type": wanted.type}
    return {"type": wanted.type, "json_schema": {"name": wanted.name, "schema": wanted.json_schema}}


router = APIRouter(route_class=ModelRoute)


@router.post("/v1/responses", response_model=None)
async def responses(request: Request, body: ResponsesBody, context: Context) -> Response:
    """Answers a conversation, whole or streamed, in the shape of OpenAI's Responses API."""
    require_task(context, "generate", request.url.path)
    model = context.served_name(body.model)
    job, reading = await _chat_job(context, body)
    answer = _unanswered(body, model, job)
    response = ResponseInProgress(job, reading, answer, one_call=body.parallel_tool_calls is False)
    if body.stream:
        return await stream_response(request, context, response)
    return await answer_response(request, context, response)


async def _chat_job(context: ServerContext, body: ResponsesBody) -> tuple[Job, ReadingPlan]:
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


def _unanswered(body: ResponsesBody, model: str, job: Job) -> ResponseAnswer:
    """The response before anything is generated: what it repeats of its request."""
    given = body.model_dump(by_alias=True, exclude_none=True)
    return ResponseAnswer(
        id=job.request_id,
        created_at=int(time.time()),
        model=model,
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        temperature=job.params.temperature,
        top_p=job.params.top_p,
        tools=given.get("tools", []),
        tool_choice=given.get("tool_choice", "auto"),
        parallel_tool_calls=body.parallel_tool_calls is not False,
        text=given.get("text") or {"format": {"type": "text"}},
        reasoning={"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        metadata=body.metadata or {},
    )
