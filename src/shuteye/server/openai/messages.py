"""Chat messages as OpenAI's clients send them, and the tools that a model may be offered, or must call.

Knows nothing of templates, nor of how a model writes calls; what cannot be shown to the model is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from shuteye.errors import InvalidRequest
from shuteye.server.http.bodies import parsed
from shuteye.server.openai.fields import Many, one_message


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


def available_tools(tools: Sequence[Tool] | None, choice: ToolChoice | None) -> list[Tool]:
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


def required_tools(tools: Sequence[Tool], choice: ToolChoice | None) -> list[Tool]:
    """The tools of which one must be called; empty if the model is free to call none."""
    if isinstance(choice, NamedToolChoice):
        return [tool for tool in tools if tool.function.name == choice.function.name]
    return list(tools) if choice == "required" else []


Role = Literal["system", "developer", "user", "assistant", "tool", "function"]

_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "function_call": (), "audio": (), "refusal": (), "annotations": ([],), "reasoning_details": ([],),
    "prefix": (False,), "tool_calls": ([],),
}  # fmt: skip
"""What clients send along with an assistant's message, and the values that say nothing; null is always one."""

_SHOWN = frozenset({"tool_calls"})
"""Those of them that are shown to the model when they say something."""


class TextPart(BaseModel):
    """One part of a message's content."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, part: Any) -> Any:
        kind = part.get("type") if isinstance(part, Mapping) else "text"
        if isinstance(kind, str) and kind != "text":
            raise InvalidRequest(
                f"Content of type '{kind}' is not supported: this model reads text only.", param="messages"
            )
        return part


class Message(BaseModel):
    """One message of a conversation. `reasoning` (or `reasoning_content`) is shown if the template shows it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Role
    content: str | Many[TextPart]
    name: str | None = None
    tool_calls: Many[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None

    _content_message = field_validator("content", mode="wrap")(one_message("a string or a list of text parts"))

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_shown(cls, message: Any) -> Any:
        if not isinstance(message, Mapping):
            return message
        kept = {name: value for name, value in message.items() if not _says_nothing(name, value)}
        if kept.get("tool_calls") and kept.get("content") is None:
            kept["content"] = ""
        return kept

    @model_validator(mode="after")
    def _calls_are_the_assistants(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            raise InvalidRequest(f"tool_calls in a message of role '{self.role}'.", param="messages")
        return self

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates read it; `developer` is what `system` was called before OpenAI's o1.

        Raises:
            InvalidRequest: the arguments of a call are not JSON.
        """
        role = "system" if self.role == "developer" else self.role
        message = {**self.model_dump(exclude_none=True), "role": role}
        for call in message.get("tool_calls", ()):
            call.pop("index", None)
            call["function"]["arguments"] = _arguments(call["function"]["arguments"])
        return message


def _arguments(text: str) -> Any:
    """Arguments as an object, which templates write in their own way."""
    try:
        return parsed((text or "{}").encode(), what="The text of a tool call's arguments")
    except InvalidRequest as error:
        raise InvalidRequest(error.message, param="messages") from error


def _says_nothing(name: str, value: object) -> bool:
    if name not in _NEUTRAL:
        return False
    if value is None or value in _NEUTRAL[name]:
        return True
    if name in _SHOWN:
        return False
    raise InvalidRequest(f"'{name}' in a message is not supported by this server.", param="messages")
