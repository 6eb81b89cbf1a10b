"""What a conversation asks of the engine: its prompt, how tokens are chosen, and how the answers are to be read.

Knows nothing of how answers are written; every route that takes conversations comes through here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from shuteye.errors import InvalidRequest
from shuteye.request import SamplingParams
from shuteye.server.budget import require_prompt_tokens, require_sequences
from shuteye.server.config import ServerConfig
from shuteye.server.context import ServerContext
from shuteye.server.generation import Job, Prompt, require_room
from shuteye.server.prompts import encode, render_chat, require_tokens, truncation_of
from shuteye.server.protocol.chat import ChatBody
from shuteye.server.protocol.tools import NamedToolChoice, Tool, forced, offered
from shuteye.server.reading.reader import ReadingPlan
from shuteye.server.reading.reasoning import END, begins_inside
from shuteye.server.reading.tool_formats import ToolFormat, format_of
from shuteye.server.tool_grammar import forced_call
from shuteye.tokenizer import Tokenizer


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
    tools = offered(body.tools, body.tool_choice)
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
    params = _obliged(params, body, forced(tools, body.tool_choice), reading, tokenizer)
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


def _obliged(
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
