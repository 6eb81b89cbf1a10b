"""What a conversation asks of the engine: OpenAI's request, its prompt, how tokens are chosen, how answers are read.

Knows nothing of how answers are written; every route that takes conversations comes through here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from shuteye.errors import InvalidRequest
from shuteye.server.config import ServerConfig
from shuteye.server.context import ServerContext
from shuteye.server.generation.run import Job, Prompt, require_room
from shuteye.server.http.admission import require_prompt_tokens, require_sequences
from shuteye.server.openai.fields import GenerationBody, Many, one_message
from shuteye.server.openai.messages import Message, NamedToolChoice, Tool, available_tools, required_tools
from shuteye.server.openai.prompts import encode, render_chat, require_tokens, truncation_of
from shuteye.server.openai.tool_calls import forced_call
from shuteye.server.parsing.parser import END, ReadingPlan, begins_inside
from shuteye.server.parsing.tool_formats import ToolFormat, format_of
from shuteye.tasks.generate.requests import SamplingParams
from shuteye.tokenizer import Tokenizer

CHOICES = "'none', 'auto', 'required' or a function's name in an object"


class ChatBody(GenerationBody):
    """The request, with vLLM's extra fields."""

    messages: Many[Message] = Field(min_length=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    tools: Many[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
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
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt cannot both be true.", param="continue_final_message"
            )
        if self.tools and self.tool_choice != "none" and self.structure is not None:
            raise InvalidRequest(
                "The output's structure cannot be given together with tools that may be called; "
                "send tool_choice 'none', or no tools.",
                param="tools",
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
        """Alternatives per token to report; None reports nothing."""
        return (self.top_logprobs or 0) if self.logprobs else None


@dataclass(frozen=True, slots=True)
class ChatJob:
    """The engine's work, how to read what comes of it, and what every answer begins with."""

    job: Job
    reading: ReadingPlan
    echo: str = ""


async def chat_job(context: ServerContext, request_id: str, body: ChatBody) -> ChatJob:
    """All that one conversation asks for.

    Raises:
        InvalidRequest: a field is wrong, or asks for what this model cannot do; `param` names it.
    """
    info, tokenizer = context.engine.info, context.engine.tokenizer
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
    limit = body.token_limit
    kept = truncation_of(body, max_model_len=info.max_model_len, max_tokens=limit).of(token_ids)
    require_room(len(kept), limit, info.max_model_len)
    require_sequences(context.config, body.n or 1, param="n")
    require_prompt_tokens(len(kept) * (body.n or 1), param="n")
    reading = _reading(context.config, tokenizer, text, has_tools=bool(tools))
    params = body.sampling_params(info.default_sampling, max_tokens=limit, logprobs=body.num_logprobs)
    params = _with_forced_tool_call(params, body, required_tools(tools, body.tool_choice), reading, tokenizer)
    if reading.needs_special_tokens(tokenizer):
        params = replace(params, skip_special_tokens=False)
    params = _after_reasoning(params, reading, text, tokenizer)
    return ChatJob(Job(request_id, (Prompt(kept),), params), reading, _echo(body))


def _template_kwargs(body: ChatBody, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the template is told beside the messages; a field that it would not look at is refused."""
    kwargs = dict(body.chat_template_kwargs or {})
    given = {"documents": body.documents or None, "reasoning_effort": body.reasoning_effort}
    for name, value in given.items():
        if value is None:
            continue
        if tokenizer.template_reads(name):
            kwargs[name] = value
        elif value != "none":
            raise InvalidRequest(
                f"'{name}' is not supported with this model: its chat template has no place for it.", param=name
            )
        elif tokenizer.template_reads("enable_thinking"):
            kwargs.setdefault("enable_thinking", False)
    return kwargs


def _reading(config: ServerConfig, tokenizer: Tokenizer, prompt: str, *, has_tools: bool) -> ReadingPlan:
    reasons = config.reasoning_parser != "none"
    return ReadingPlan(
        tools=_tool_format(config, tokenizer) if has_tools else None,
        reasons=reasons,
        begins_inside=reasons and begins_inside(config.reasoning_parser, prompt),
    )


def _tool_format(config: ServerConfig, tokenizer: Tokenizer) -> ToolFormat:
    if config.tool_call_parser != "auto":
        return config.tool_call_parser
    return format_of(tokenizer.template_source(with_tools=True))


def _with_forced_tool_call(
    params: SamplingParams, body: ChatBody, tools: Sequence[Tool], reading: ReadingPlan, tokenizer: Tokenizer
) -> SamplingParams:
    """With a grammar that makes the model call one of `tools`, if there are any."""
    if not tools:
        return params
    assert reading.tools is not None
    several = body.parallel_tool_calls is not False and not isinstance(body.tool_choice, NamedToolChoice)
    return replace(params, structured_outputs=forced_call(tools, reading.tools, tokenizer, several=several))


def _after_reasoning(params: SamplingParams, reading: ReadingPlan, prompt: str, tokenizer: Tokenizer) -> SamplingParams:
    """A structure holds for what follows the reasoning, if there may be any."""
    structure = params.structured_outputs
    if structure is None or not reading.reasons or prompt.rstrip().endswith(END):
        return params
    end = tokenizer.token_to_id(END)
    if end is None:
        raise InvalidRequest(
            f"{structure.param} is not supported together with reasoning here: {END} is no token of this model.",
            param=structure.param,
        )
    return replace(params, structured_outputs=replace(structure, starts_after=end))


def _echo(body: ChatBody) -> str:
    """The final message's text, if the answer continues it and the caller wants to see it."""
    final = body.messages[-1]
    if not body.echo or final.role != "assistant":
        return ""
    return final.content if isinstance(final.content, str) else "\n".join(part.text for part in final.content)
