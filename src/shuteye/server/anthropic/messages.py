"""POST /v1/messages, and its /count_tokens and /render: Anthropic's request, as the chat that it stands for."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from msgspec import Struct
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shuteye.errors import InvalidRequest, PromptTooLong
from shuteye.server.anthropic.blocks import TextBlocks, ToolDefinition, Turn, messages_of
from shuteye.server.anthropic.message_events import InputUsage, MessageInProgress, answer_message, stream_message
from shuteye.server.context import Context, ServerContext
from shuteye.server.generation.answer import new_request_id
from shuteye.server.generation.run import Job
from shuteye.server.http.admission import ModelRoute, require_task
from shuteye.server.http.answers import JsonAnswer
from shuteye.server.http.auth import InferenceRoute
from shuteye.server.http.errors import invalid_request
from shuteye.server.http.ignored_fields import ignore, renamed
from shuteye.server.openai.chat import ChatBody, chat_job, chat_prompt
from shuteye.server.openai.fields import Many, settle_unsupported
from shuteye.server.openai.render import rendered
from shuteye.server.parsing.parser import ReadingPlan
from shuteye.tokenizer import Tokenizer

_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "container": (), "context_management": ({"edits": []},), "kv_transfer_params": (), "mcp_servers": ([],),
    "speed": ("standard",),
}  # fmt: skip
"""Fields that would change the answer, each with the values that ask for nothing; null is always one."""

_HARMLESS = frozenset(
    {"cache_control", "diagnostics", "inference_geo", "metadata", "service_tier", "user_profile_id", "workspace_id"}
)


class ToolChoiceField(BaseModel):
    """Which tools may, or must, be called."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _a_name_goes_with_its_type(self) -> ToolChoiceField:
        if (self.type == "tool") != (self.name is not None):
            raise InvalidRequest(
                "tool_choice needs a name if its type is 'tool', and has none otherwise.", param="tool_choice"
            )
        return self

    def for_chat(self) -> Any:
        """The same to the chat route."""
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name}}
        return "required" if self.type == "any" else self.type


class Thinking(BaseModel):
    """Whether the model is to think first; how long it thinks is up to the model."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: int | None = Field(default=None, ge=1)
    display: Literal["summarized"] | None = None


class JsonFormat(BaseModel):
    """What the words of an answer must be."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(BaseModel):
    """How much effort an answer is worth, and its format."""

    model_config = ConfigDict(extra="forbid", strict=True)

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonFormat | None = None


class ConversationBody(BaseModel):
    """What of a request makes its prompt."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    messages: Many[Turn] = Field(min_length=1)
    system: TextBlocks | None = None
    tools: Many[ToolDefinition] | None = None
    tool_choice: ToolChoiceField | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: JsonFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _settle(cls, body: Any) -> Any:
        if isinstance(body, dict):
            body = {name: value for name, value in body.items() if name not in _HARMLESS}
        return settle_unsupported(body, cls.model_fields, unsupported=_UNSUPPORTED)

    @property
    def continues(self) -> bool:
        """Whether the answer goes on with the final message, which is the model's own."""
        final = self.messages[-1]
        return final.role == "assistant" and any(block.text for block in final.content) and not self._ends_with_a_call

    @property
    def _ends_with_a_call(self) -> bool:
        return any(block.type == "tool_use" for block in self.messages[-1].content)

    def chat_fields(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """The same to the chat route.

        Raises:
            InvalidRequest: thinking is asked for, and this model cannot be told to.
        """
        config = self.output_config or OutputConfig()
        wanted = config.format or self.output_format
        choice = self.tool_choice
        return {
            "model": self.model,
            "messages": messages_of(self.system, self.messages),
            "continue_final_message": self.continues or None,
            "tools": [tool.for_chat() for tool in self.tools] if self.tools else None,
            "tool_choice": choice.for_chat() if choice else None,
            "parallel_tool_calls": not choice.disable_parallel_tool_use if choice else None,
            "reasoning_effort": config.effort,
            "response_format": wanted and {"type": "json_schema", "json_schema": {"schema": wanted.json_schema}},
            "chat_template_kwargs": self._template_kwargs(tokenizer),
        }

    def _template_kwargs(self, tokenizer: Tokenizer) -> dict[str, Any] | None:
        kwargs = self.chat_template_kwargs
        if self.thinking is None:
            return kwargs
        if self.thinking.budget_tokens is not None and not ignore(["thinking.budget_tokens"]):
            raise InvalidRequest("'thinking.budget_tokens' is not supported by this server.", param="thinking")
        if tokenizer.template_reads("enable_thinking"):
            return {"enable_thinking": self.thinking.type != "disabled", **(kwargs or {})}
        return kwargs


class MessagesBody(ConversationBody):
    """The request, with some of vLLM's extra fields."""

    max_tokens: int = Field(ge=1)
    stream: bool | None = None
    stop_sequences: Many[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    cache_salt: str | None = None
    priority: int | None = None

    def chat_fields(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """The same to the chat route."""
        names = ("temperature", "top_p", "top_k", "cache_salt", "priority")
        said = {name: getattr(self, name) for name in names}
        return super().chat_fields(tokenizer) | said | {"stop": self.stop_sequences, "max_tokens": self.max_tokens}

    @property
    def shows_thinking(self) -> bool:
        """Whether thinking is part of the answer, if there is any."""
        return self.thinking is None or self.thinking.type != "disabled"

    @property
    def one_call(self) -> bool:
        """Whether calls after the first are left out."""
        return self.tool_choice is not None and self.tool_choice.disable_parallel_tool_use is True


class CountAnswer(Struct):
    """Answer of POST /v1/messages/count_tokens."""

    input_tokens: int


class _MessagesRoute(ModelRoute):
    key_header = "x-api-key"


class _OpenRoute(InferenceRoute):
    key_header = "x-api-key"


router = APIRouter(route_class=_MessagesRoute)
without_weights = APIRouter(route_class=_OpenRoute)


@router.post("/v1/messages", response_model=None)
async def messages(request: Request, body: MessagesBody, context: Context) -> Response:
    """Answers a conversation, whole or streamed, in the shape of Anthropic's Messages API."""
    require_task(context, "generate", request.url.path)
    model = context.served_name(body.model)
    job, reading = await _message_job(context, body)
    engine = context.engine
    caching = engine.config.enable_prefix_caching
    message = MessageInProgress(
        job,
        reading,
        model=model,
        one_call=body.one_call,
        shows_thinking=body.shows_thinking,
        usage=InputUsage(len(job.prompts[0].token_ids), block_size=engine.info.block_size if caching else None),
    )
    if body.stream:
        return await stream_message(request, context, message)
    return await answer_message(request, context, message)


@without_weights.post("/v1/messages/count_tokens", response_model=None)
async def count_tokens(request: Request, body: ConversationBody, context: Context) -> Response:
    """How many tokens the prompt of a conversation has, however long it is."""
    require_task(context, "generate", request.url.path)
    context.served_name(body.model)
    fields = body.chat_fields(context.engine.tokenizer)
    _require_thinking(context, body)
    prompt = await chat_prompt(context, _chat_body(fields))
    renamed(_PARAMS)
    return JsonAnswer(CountAnswer(len(prompt.token_ids)))


@without_weights.post("/v1/messages/render", response_model=None)
async def render_message(request: Request, body: MessagesBody, context: Context) -> Response:
    """The prompt that a conversation becomes."""
    require_task(context, "generate", request.url.path)
    model = context.served_name(body.model)
    job, _reading = await _message_job(context, body)
    (answer,) = await rendered(context, job, model=model, stream=body.stream)
    return JsonAnswer(answer)


async def _message_job(context: ServerContext, body: MessagesBody) -> tuple[Job, ReadingPlan]:
    """What the message asks of the engine; `max_tokens` is a bound that may lie beyond the end of the context."""
    _require_thinking(context, body)
    fields = body.chat_fields(context.engine.tokenizer)
    request_id = new_request_id("msg")
    try:
        made = await chat_job(context, request_id, _chat_body(fields))
    except PromptTooLong:
        made = await chat_job(context, request_id, _chat_body(fields | {"max_tokens": None}))
    renamed(_PARAMS)
    return made


_PARAMS = {"reasoning_effort": "output_config.effort"}
"""Fields of the chat route, and what they are called here."""


def _chat_body(fields: dict[str, Any]) -> ChatBody:
    try:
        return ChatBody.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        raise invalid_request([{**one, "loc": ("body", *one["loc"])} for one in error.errors()]) from error


def _require_thinking(context: ServerContext, body: ConversationBody) -> None:
    """Refuse to think where the model cannot be told to, and nothing would tell its thoughts from its words."""
    if body.thinking is None or body.thinking.type != "enabled":
        return
    if context.config.reasoning_parser == "none":
        raise InvalidRequest(
            "thinking is not supported by this server: it has no --reasoning-parser that tells thoughts from words.",
            param="thinking",
        )
