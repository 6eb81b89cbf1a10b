"""Tools: as callers define them, in prompts whose template has no words for them, as grammars, and calls in answers.

Syntax of grammars: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from msgspec import Struct
from pydantic import BaseModel, ConfigDict, Field

from shuteye.errors import InvalidRequest
from shuteye.server.http.bodies import parsed
from shuteye.server.parsing.tool_formats import HERMES_BEGIN, HERMES_END, MISTRAL_BEGIN, ToolFormat
from shuteye.tasks.generate.requests import JSON_WHITESPACE, StructuredOutputsParams
from shuteye.tokenizer import Tokenizer

# --- requests -----------------------------------------------------------------------------------


class FunctionDefinition(BaseModel):
    """A function; without `parameters` it has none. A forced call always obeys its schema, whatever `strict` says."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def schema_of_arguments(self) -> dict[str, Any]:
        """The JSON schema of its arguments."""
        if not self.parameters:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        return {"type": "object", **self.parameters}


class Tool(BaseModel):
    """Something the model may call."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["function"]
    function: FunctionDefinition

    def for_template(self) -> dict[str, Any]:
        """The tool as chat templates read it."""
        return self.model_dump(exclude_none=True)


class NamedFunction(BaseModel):
    """Which function."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str


class NamedToolChoice(BaseModel):
    """This function must be called."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["function"]
    function: NamedFunction


class AllowedTool(BaseModel):
    """One of the tools that may be called."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(BaseModel):
    """Which tools may be called, and whether one must be."""

    model_config = ConfigDict(extra="forbid", strict=True)

    mode: Literal["auto", "required"]
    tools: list[AllowedTool] = Field(min_length=1)


class AllowedToolsChoice(BaseModel):
    """OpenAI's way to offer only some of the tools."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice | AllowedToolsChoice


class CalledFunction(BaseModel):
    """What was called, with arguments as JSON text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call that an assistant's message made."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: str | None = None
    index: int | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


def available_tools(tools: Sequence[Tool] | None, choice: ToolChoice | None) -> list[Tool]:
    """The tools in the model's prompt: none if it may call none.

    Raises:
        InvalidRequest: a call is demanded of a tool that there is not, or two tools share a name.
    """
    tools = list(tools or ())
    if choice == "none":
        return []
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise InvalidRequest(f"tools must have names of their own, got {', '.join(map(repr, names))}.", param="tools")
    if choice == "required" and not tools:
        raise InvalidRequest("tool_choice 'required' needs tools to choose from.", param="tool_choice")
    if isinstance(choice, NamedToolChoice) and choice.function.name not in names:
        raise InvalidRequest(
            f"tool_choice names {choice.function.name!r}, which is none of the tools: "
            f"{', '.join(map(repr, names)) or 'there are none'}.",
            param="tool_choice",
        )
    return _allowed(tools, choice) if isinstance(choice, AllowedToolsChoice) else tools


def _allowed(tools: Sequence[Tool], choice: AllowedToolsChoice) -> list[Tool]:
    wanted = {allowed.function.name for allowed in choice.allowed_tools.tools}
    unknown = wanted - {tool.function.name for tool in tools}
    if unknown:
        raise InvalidRequest(
            f"tool_choice allows {', '.join(map(repr, sorted(unknown)))}, which are none of the tools.",
            param="tool_choice",
        )
    return [tool for tool in tools if tool.function.name in wanted]


def required_tools(tools: Sequence[Tool], choice: ToolChoice | None) -> list[Tool]:
    """The tools of which one must be called; empty if the model is free to call none."""
    if isinstance(choice, NamedToolChoice):
        return [tool for tool in tools if tool.function.name == choice.function.name]
    if isinstance(choice, AllowedToolsChoice):
        return list(tools) if choice.allowed_tools.mode == "required" else []
    return list(tools) if choice == "required" else []


# --- answers ------------------------------------------------------------------------------------


class CalledFunctionAnswer(Struct):
    """What the model calls, with arguments as JSON text."""

    name: str
    arguments: str


class ToolCallAnswer(Struct):
    """A call that the model made."""

    id: str
    type: Literal["function"]
    function: CalledFunctionAnswer


class FunctionDelta(Struct, omit_defaults=True, kw_only=True):
    """More of a call; the name stands in its first delta alone."""

    name: str | None = None
    arguments: str


class ToolCallDelta(Struct, omit_defaults=True, kw_only=True):
    """One entry of a streamed `tool_calls`; id and type stand in a call's first alone."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


# --- calls that the model must make -------------------------------------------------------------

MAX_CALLS = 16
"""Most calls that a model can be made to write in one answer, so that one that repeats itself comes to an end."""


@dataclass(frozen=True, slots=True)
class _Words:
    """What stands around calls: before and after all of them, around and between single ones, and before arguments."""

    opening: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    arguments: str = "arguments"
    after: tuple[str, ...] = ()
    between: str = ""
    closing: tuple[str, ...] = ()


_WORDS: Mapping[ToolFormat, _Words] = {
    "hermes": _Words(before=(HERMES_BEGIN, "\n"), after=("\n", HERMES_END), between="\n"),
    "llama3_json": _Words(arguments="parameters", between="; "),
    "mistral": _Words(opening=(MISTRAL_BEGIN, "["), between=", ", closing=("]",)),
}


def forced_call(
    tools: Sequence[Tool], tool_format: ToolFormat, tokenizer: Tokenizer, *, several: bool
) -> StructuredOutputsParams:
    """Structure of an output that calls one of the tools, or, if `several`, up to MAX_CALLS."""
    rules = ["start: calls", *_calls(tools, tool_format, tokenizer, several=several)]
    return StructuredOutputsParams(grammar="\n".join(rules), param="tools")


def call_or_content(
    tools: Sequence[Tool],
    tool_format: ToolFormat,
    tokenizer: Tokenizer,
    *,
    several: bool,
    content: StructuredOutputsParams,
) -> StructuredOutputsParams:
    """Structure of an output that calls tools, as `forced_call` has it, or else is what `content` says.

    Raises:
        InvalidRequest: `content` is a grammar, whose rules cannot be told from those of calls.
    """
    rules = ["start: calls | content", *_calls(tools, tool_format, tokenizer, several=several)]
    if content.choice is not None:
        rules.append(f"content: {' | '.join(json.dumps(text) for text in content.choice)}")
    elif content.regex is not None:
        rules += ["content: CONTENT", f"CONTENT: /{_escaped(content.regex)}/"]
    elif content.grammar is not None:
        raise InvalidRequest(
            f"A grammar ({content.param}) cannot be given together with tools that may be called.", param=content.param
        )
    else:
        rules.append(f"content: %json {json.dumps(_schema(content))}")
    return StructuredOutputsParams(grammar="\n".join(rules), param=content.param)


def _schema(content: StructuredOutputsParams) -> dict[str, Any]:
    """The JSON schema of a content, with how much whitespace it may have."""
    given: Any = {"type": "object"} if content.json is None else content.json
    if isinstance(given, str):
        given = parsed(given.encode(), what="The schema")
    if not isinstance(given, dict):
        raise InvalidRequest("A schema together with tools must be an object.", param=content.param)
    space = {"whitespace_pattern": content.whitespace_pattern or JSON_WHITESPACE}
    return given | {"x-guidance": {"whitespace_flexible": False} if content.disable_any_whitespace else space}


def _escaped(regex: str) -> str:
    """A regular expression between slashes, as Lark writes it."""
    return re.sub(r"(\\.)|/", lambda match: match[1] or r"\/", regex, flags=re.DOTALL).replace("\n", r"\n")


def _calls(tools: Sequence[Tool], tool_format: ToolFormat, tokenizer: Tokenizer, *, several: bool) -> list[str]:
    """The rule `calls`, and those that it is made of."""
    words = _WORDS[tool_format]

    def literal(*texts: str) -> str:
        return " ".join(_literal(text, tokenizer) for text in texts)

    more = f"({literal(words.between)} call){{0,{MAX_CALLS - 1}}}" if several else ""
    rules = [
        f"calls: {literal(*words.opening)} call {more} {literal(*words.closing)}",
        f"call: {literal(*words.before)} ({' | '.join(f'tool_{index}' for index in range(len(tools)))}) "
        f"{literal(*words.after)}",
    ]
    for index, tool in enumerate(tools):
        head = f'{{"name": {json.dumps(tool.function.name)}, "{words.arguments}": '
        schema = tool.function.schema_of_arguments | {"x-guidance": {"whitespace_pattern": JSON_WHITESPACE}}
        rules += [
            f'tool_{index}: {json.dumps(head)} arguments_{index} "}}"',
            f"arguments_{index}: %json {json.dumps(schema)}",
        ]
    return rules


def _literal(text: str, tokenizer: Tokenizer) -> str:
    """A text as it is, or as the special token that it is to this tokenizer."""
    token_id = tokenizer.token_to_id(text)
    return f"<[{token_id}]>" if token_id is not None and tokenizer.is_special(token_id) else json.dumps(text)


# --- templates without tools --------------------------------------------------------------------

_INTRODUCTION = (
    "You can call these functions, each described by a JSON object on a line of its own:\n{tools}\n"
    "To call one, write a JSON object with its name and its arguments, like this:\n"
    f'{HERMES_BEGIN}\n{{{{"name": "…", "arguments": {{{{…}}}}}}}}\n{HERMES_END}'
)


def fallback_tool_prompt(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The conversation with tools described in its system message, and calls and their results written out as text."""
    plain = [_plain(message) for message in messages]
    if not tools:
        return plain
    described = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    introduction = _INTRODUCTION.format(tools=described)
    if plain and plain[0]["role"] == "system":
        head = plain[0] | {"content": f"{_text(plain[0].get('content'))}\n\n{introduction}"}
        return [head, *plain[1:]]
    return [{"role": "system", "content": introduction}, *plain]


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    content = _text(message.get("content"))
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    if message.get("tool_calls"):
        calls = [f"{HERMES_BEGIN}\n{_call(call['function'])}\n{HERMES_END}" for call in message["tool_calls"]]
        return {"role": message["role"], "content": "\n".join([*([content] if content else []), *calls])}
    return dict(message)


def _call(function: Mapping[str, Any]) -> str:
    return json.dumps({"name": function["name"], "arguments": function["arguments"]}, ensure_ascii=False)


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content)
    return content or ""
