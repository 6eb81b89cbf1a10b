"""Tools as OpenAI's clients describe them, and whether the model must call one.

Knows nothing of how a model is told of them, nor of how it writes calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from shuteye.errors import InvalidRequest


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


ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice


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


def offered(tools: Sequence[Tool] | None, choice: ToolChoice | None) -> list[Tool]:
    """The tools that the model is told of: none if it may call none.

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
    return tools


def forced(tools: Sequence[Tool], choice: ToolChoice | None) -> list[Tool]:
    """The tools of which one must be called; empty if the model is free to call none."""
    if isinstance(choice, NamedToolChoice):
        return [tool for tool in tools if tool.function.name == choice.function.name]
    return list(tools) if choice == "required" else []


def call_delta(
    index: int, *, call_id: str | None = None, name: str | None = None, arguments: str = ""
) -> dict[str, Any]:
    """One entry of a streamed `tool_calls`; id and name stand in a call's first only."""
    if name is None:
        return {"index": index, "function": {"arguments": arguments}}
    return {"index": index, "id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def whole_call(delta: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of a whole message's `tool_calls`, made of its single delta."""
    return {name: value for name, value in delta.items() if name != "index"}
