"""POST /v1/chat/completions: OpenAI's request with vLLM's additions, and what it asks of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import Field, field_validator, model_validator

from shuteye.errors import InvalidRequest
from shuteye.server.context import Context, ServerContext
from shuteye.server.generation.answer import answer_stream, answer_whole, new_request_id
from shuteye.server.generation.run import Job, Prompt
from shuteye.server.http.admission import ModelRoute, require_prompt_tokens, require_sequences, require_task
from shuteye.server.http.ignored_fields import ignore
from shuteye.server.openai.beams import beams_of
from shuteye.server.openai.chat_answers import ChatWriter
from shuteye.server.openai.fields import GenerationBody, Many, one_message
from shuteye.server.openai.logprobs import TokenNames
from shuteye.server.openai.prompts import Message, encode, render_chat, require_room, require_tokens
from shuteye.server.openai.tools import (
    NamedToolChoice,
    Tool,
    ToolChoice,
    available_tools,
    call_or_content,
    forced_call,
    required_tools,
)
from shuteye.server.parsing.parser import END, ReadingPlan, begins_inside
from shuteye.server.parsing.tool_formats import ToolFormat, format_of
from shuteye.tasks.generate.logprob_limits import LogprobLimits
from shuteye.tasks.generate.requests import WHOLE_VOCABULARY, SamplingParams
from shuteye.tokenizer import Tokenizer

CHOICES = "'none', 'auto', 'required' or a function's name in an object"


class ChatBody(GenerationBody):
    """The request, with vLLM's extra fields."""

    messages: Many[Message] = Field(min_length=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=-1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    tools: Many[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    reasoning_effort: str | None = None
    documents: Many[dict[str, str]] | None = None
    echo: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    _choice_message = field_validator("tool_choice", mode="wrap")(one_message(CHOICES))

    @model_validator(mode="after")
    def _check_chat_fields_that_go_together(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs is only allowed when logprobs is true.", param="top_logprobs")
        if self.logprob_token_ids is not None and not self.logprobs:
            raise InvalidRequest("logprob_token_ids is only allowed when logprobs is true.", param="logprob_token_ids")
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt cannot both be true.", param="continue_final_message"
            )
        return self

    @property
    def token_limit(self) -> int | None:
        """`max_completion_tokens`, or its older name `max_tokens`; None means what is left of the context.

        Raises:
            InvalidRequest: both are given and differ.
        """
        limits = {limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None}
        if len(limits) > 1:
            raise InvalidRequest(
                f"max_tokens ({self.max_tokens}) and max_completion_tokens ({self.max_completion_tokens}) mean the "
                "same and differ; send one of them.",
                param="max_completion_tokens",
            )
        return next(iter(limits), None)

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives per token to report, -1 for all; None reports nothing."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def num_shown(self) -> int | None:
        """Of what is known of a token, how many entries are told, -1 for all; None tells nothing."""
        return WHOLE_VOCABULARY if self.logprob_token_ids is not None else self.num_logprobs


# --- from a body to the engine's work -----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation as the model is to read it, and the tools that it is told of."""

    text: str
    token_ids: list[int]
    tools: list[Tool]


async def chat_prompt(context: ServerContext, body: ChatBody) -> ChatPrompt:
    """The prompt of a conversation, however long it is; nothing of this needs the weights.

    Raises:
        InvalidRequest: the template refuses the messages, or a tool, or there is not a single token.
    """
    tokenizer = context.engine.tokenizer
    tools = available_tools(body.tools, body.tool_choice)
    text = await render_chat(
        tokenizer,
        body.messages,
        add_generation_prompt=body.add_generation_prompt is not False and not body.continue_final_message,
        template_kwargs=_template_kwargs(body, tokenizer),
        tools=tools,
        continue_final_message=body.continue_final_message is True,
    )
    token_ids = await encode(tokenizer, text, add_special_tokens=body.add_special_tokens is True)
    require_tokens(token_ids, param="messages")
    return ChatPrompt(text, token_ids, tools)


async def chat_job(context: ServerContext, request_id: str, body: ChatBody) -> tuple[Job, ReadingPlan]:
    """What one conversation asks of the engine, and how the answers are read.

    Raises:
        InvalidRequest: a field is wrong, or asks for what this model cannot do; `param` names it.
    """
    info, tokenizer, config = context.engine.info, context.engine.tokenizer, context.config
    prompt = await chat_prompt(context, body)
    text, token_ids, tools = prompt.text, prompt.token_ids, prompt.tools
    limit, n = body.token_limit, body.n or 1
    kept = body.truncated(token_ids, room=info.max_model_len - (limit or 1))
    require_room(len(kept), limit, info.max_model_len)
    require_sequences(config, n, param="n")
    require_prompt_tokens(len(kept) * n, param="n")
    # how the answers are read
    tool_format: ToolFormat | None = None
    if tools:
        template = tokenizer.template_source(with_tools=True)
        tool_format = config.tool_call_parser if config.tool_call_parser != "auto" else format_of(template)
    reasons = config.reasoning_parser != "none"
    reading = ReadingPlan(tool_format, reasons, reasons and begins_inside(config.reasoning_parser, text))
    # how tokens are chosen
    params = body.sampling_params(info.default_sampling, max_tokens=limit, logprobs=body.num_logprobs)
    params = LogprobLimits.of(info).resolved(params, num_prompt_tokens=len(kept), param="top_logprobs")
    if tool_format is not None:
        params = _with_calls(params, body, tools, tool_format, tokenizer)
    if reading.needs_special_tokens(tokenizer):
        params = replace(params, skip_special_tokens=False)
    if reasons and not text.rstrip().endswith(END):
        params = _after_reasoning(params, tokenizer, must_reason=reading.begins_inside)
    beams = beams_of(body, params, max_tokens=limit or info.max_model_len)
    return Job(request_id, (Prompt(kept),), params, beams=beams), reading


def _with_calls(
    params: SamplingParams, body: ChatBody, tools: Sequence[Tool], tool_format: ToolFormat, tokenizer: Tokenizer
) -> SamplingParams:
    """A call that must be made has no room for a structure of content; one that may be made is an alternative to it."""
    several = body.parallel_tool_calls is not False and not isinstance(body.tool_choice, NamedToolChoice)
    content = params.structured_outputs
    if required := required_tools(tools, body.tool_choice):
        structure = forced_call(required, tool_format, tokenizer, several=several)
    elif content is not None:
        structure = call_or_content(tools, tool_format, tokenizer, several=several, content=content)
    else:
        return params
    return replace(params, structured_outputs=structure)


def _template_kwargs(body: ChatBody, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the template gets beside the messages; documents that it would not look at are refused, an effort is not."""
    kwargs = dict(body.chat_template_kwargs or {})
    given = {"documents": body.documents or None, "reasoning_effort": body.reasoning_effort}
    for name, value in given.items():
        if value is None:
            continue
        if tokenizer.template_reads(name):
            kwargs[name] = value
        elif name == "reasoning_effort" and (value == "none" or ignore([name])):
            if value == "none" and tokenizer.template_reads("enable_thinking"):
                kwargs.setdefault("enable_thinking", False)
        else:
            raise InvalidRequest(
                f"'{name}' is not supported with this model: its chat template has no place for it.", param=name
            )
    return kwargs


def _after_reasoning(params: SamplingParams, tokenizer: Tokenizer, *, must_reason: bool) -> SamplingParams:
    """A structure, if there is one, holds for what follows the reasoning; for all where nothing could end it."""
    structure = params.structured_outputs
    if structure is None:
        return params
    end = tokenizer.token_to_id(END)
    if end is None and not must_reason:
        return params
    if end is None:
        raise InvalidRequest(
            f"{structure.param} is not supported together with reasoning here: {END} is no token of this model.",
            param=structure.param,
        )
    return replace(params, structured_outputs=replace(structure, starts_after=end))


# --- the route ----------------------------------------------------------------------------------

router = APIRouter(route_class=ModelRoute)


@router.post("/v1/chat/completions", response_model=None)
async def chat_completions(request: Request, body: ChatBody, context: Context) -> Response:
    """Answers a conversation, whole or streamed."""
    require_task(context, "generate", request.url.path)
    model = context.served_name(body.model)
    job, reading = await chat_job(context, new_request_id("chatcmpl"), body)
    writer = ChatWriter(
        prompts=job.prompts,
        shows_token_ids=body.return_token_ids is True,
        names=TokenNames(context.engine.tokenizer, body.names_by_id(context.config)),
        num_top=body.num_shown,
        reading=reading,
        echo=_echo(body),
        named_call=isinstance(body.tool_choice, NamedToolChoice),
        one_call=body.parallel_tool_calls is False,
        show_reasoning=body.include_reasoning is not False,
    )
    if body.stream:
        return await answer_stream(
            request, context, job, writer=writer, model=model, usage_in=body.usage_in(context.config)
        )
    return await answer_whole(request, context, job, writer=writer, model=model)


def _echo(body: ChatBody) -> str:
    """The final message's text, if the answer continues it and the caller wants to see it."""
    final = body.messages[-1]
    if not body.echo or final.role != "assistant":
        return ""
    return final.content if isinstance(final.content, str) else "\n".join(part.text for part in final.content)
