"""POST /v1/responses: OpenAI's request, as the conversation that it stands for.

Nothing is stored: what refers to earlier responses is refused, and `store` is left out.
"""

from __future__ import annotations

import reprlib
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from shuteye.errors import InvalidRequest, PromptTooLong, ResponseNotFound
from shuteye.server.context import Context, ServerContext
from shuteye.server.generation.answer import new_request_id
from shuteye.server.generation.run import Job
from shuteye.server.http.admission import ModelRoute, require_task
from shuteye.server.http.auth import InferenceRoute
from shuteye.server.http.errors import invalid_request
from shuteye.server.http.ignored_fields import ignore, renamed
from shuteye.server.openai.chat import ChatBody, chat_job
from shuteye.server.openai.fields import Many, one_message, settle_unsupported
from shuteye.server.openai.logprobs import TokenNames
from shuteye.server.openai.response_events import ResponseAnswer, ResponseInProgress, answer_response, stream_response
from shuteye.server.openai.response_items import Item, begun_at, messages_of, possible_starts
from shuteye.server.parsing.parser import ReadingPlan

HARMLESS = frozenset({"user", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"})
"""Fields that change nothing in what is generated."""

REFUSED: Mapping[str, tuple[object, ...]] = {
    "background": (False,), "conversation": (), "previous_response_id": (), "previous_response": (),
    "previous_input_messages": ([],),
}  # fmt: skip
"""Fields that refer to what other servers keep, each with the values that ask for nothing; null is always one."""

UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "context_management": ([],), "mm_processor_kwargs": ({},), "moderation": (), "n": (1,), "prompt": (),
    "thinking_token_budget": (-1,), "use_beam_search": (False,),
}  # fmt: skip
"""Other fields that this server does nothing for."""

LOGPROBS = "message.output_text.logprobs"
INCLUDES = (LOGPROBS, "reasoning.encrypted_content")
"""What `include` may ask for; nothing is encrypted here, as nothing has to be hidden from callers."""

_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens",
    "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "priority", "parallel_tool_calls",
    "chat_template_kwargs", "structured_outputs", "cache_salt", "skip_special_tokens", "include_stop_str_in_output",
    "allowed_token_ids", "bad_words",
)  # fmt: skip


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
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None

    @model_validator(mode="after")
    def _makes_no_summaries(self) -> _Reasoning:
        asked = [f"reasoning.{name}" for name in ("summary", "generate_summary") if getattr(self, name) is not None]
        if asked and not ignore(asked):
            raise InvalidRequest(
                f"'{asked[0]}' is not supported by this server: reasoning is shown as it is.", param=asked[0]
            )
        return self


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

    input: Annotated[Many[Item], BeforeValidator(_as_items)] = Field(min_length=1, json_schema_extra=_or_text)
    model: str | None = None
    instructions: str | None = None
    metadata: dict[str, str] | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    max_tool_calls: int | None = Field(default=None, ge=1)  # of built-in tools, of which there are none here
    include: Many[str] | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    truncation: Literal["auto", "disabled"] | None = None
    store: bool | None = None
    enable_response_messages: bool | None = None
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
    cache_salt: str | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    allowed_token_ids: Many[int] | None = None
    bad_words: Many[str] | None = None

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
        return settle_unsupported(kept, cls.model_fields, unsupported=UNSUPPORTED)

    @model_validator(mode="after")
    def _check_what_is_asked_for_beside_the_text(self) -> ResponsesBody:
        unknown = [name for name in self.include or () if name not in INCLUDES]
        if unknown:
            raise InvalidRequest(
                f"include of {unknown[0]!r} is not supported by this server; it may ask for "
                f"{' and '.join(map(repr, INCLUDES))}.",
                param="include",
            )
        if self.top_logprobs and self.num_logprobs is None:
            raise InvalidRequest(f"top_logprobs needs include: [{LOGPROBS!r}].", param="top_logprobs")
        if self.store and not ignore(["store"]):
            raise InvalidRequest("'store' is not supported by this server, which keeps no responses.", param="store")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives per token to report; None reports nothing."""
        return (self.top_logprobs or 0) if LOGPROBS in (self.include or ()) else None

    def as_chat(self, items: Sequence[Item]) -> ChatBody:
        """The same request to the chat route.

        Args:
            items: those of `input` that are sent there.

        Raises:
            InvalidRequest: what only the chat's own validation finds.
        """
        fields: dict[str, Any] = {name: getattr(self, name) for name in _SAMPLING}
        fields |= {
            "model": self.model,
            "messages": messages_of(self.instructions, items),
            "max_tokens": self.max_output_tokens,
            "logprobs": self.num_logprobs is not None,
            "top_logprobs": self.top_logprobs,
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
    job, reading = await response_job(context, body)
    answer = _unanswered(body, model, job)
    response = ResponseInProgress(
        job,
        reading,
        answer,
        one_call=body.parallel_tool_calls is False,
        names=TokenNames(context.engine.tokenizer, as_ids=context.config.return_tokens_as_token_ids),
        shows_messages=body.enable_response_messages is True,
    )
    if body.stream:
        return await stream_response(request, context, response)
    return await answer_response(request, context, response)


_NOT_KEPT = APIRouter(route_class=InferenceRoute)


@_NOT_KEPT.get("/v1/responses/{name}", response_model=None)
@_NOT_KEPT.delete("/v1/responses/{name}", response_model=None)
@_NOT_KEPT.post("/v1/responses/{name}/cancel", response_model=None)
async def kept_response(name: str) -> Response:
    """Nothing: no response is kept, as ADR 29 says."""
    raise ResponseNotFound(
        f"Response with id {reprlib.repr(name)} not found. This server keeps no responses: send the whole conversation "
        "as input.",
        param="response_id",
    )


router.include_router(_NOT_KEPT)


async def response_job(context: ServerContext, body: ResponsesBody) -> tuple[Job, ReadingPlan]:
    """What the response asks of the engine; without its oldest items, if it is too long and may be cut.

    Raises:
        InvalidRequest: a field is wrong, or asks for what this model cannot do; `param` names it.
    """
    try:
        return await _job_of(context, body, body.input)
    except PromptTooLong as error:
        if body.truncation != "auto":
            raise
        too_long = error
    for starts in possible_starts(body.input):
        if (found := await _longest_of(context, body, starts)) is not None:
            return found
    raise too_long


async def _longest_of(
    context: ServerContext, body: ResponsesBody, starts: Sequence[int]
) -> tuple[Job, ReadingPlan] | None:
    """The longest conversation that fits, begun at one of `starts`, of which few are tried: later ones are shorter."""
    found = None
    begin, end = 0, len(starts)
    while begin < end:
        middle = (begin + end) // 2
        try:
            found = await _job_of(context, body, begun_at(body.input, starts[middle]))
            end = middle
        except PromptTooLong:
            begin = middle + 1
    return found


async def _job_of(context: ServerContext, body: ResponsesBody, items: Sequence[Item]) -> tuple[Job, ReadingPlan]:
    try:
        made = await chat_job(context, new_request_id("resp"), body.as_chat(items))
    except ValidationError as error:
        raise invalid_request([{**one, "loc": ("body", *one["loc"])} for one in error.errors()]) from error
    except InvalidRequest as error:
        raise type(error)(error.message, param=_PARAMS.get(error.param or "", error.param)) from error
    renamed({"reasoning_effort": "reasoning.effort"})
    return made


_PARAMS = {
    "messages": "input",
    "prompt": "input",
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
        truncation=body.truncation or "disabled",
        max_tool_calls=body.max_tool_calls,
        top_logprobs=body.num_logprobs,
        metadata=body.metadata or {},
    )
