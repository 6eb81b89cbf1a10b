"""What a conversation of Anthropic's consists of, block by block, and the chat messages that it stands for.

Knows nothing of answers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from shuteye.errors import InvalidRequest
from shuteye.server.http.ignored_fields import ignore
from shuteye.server.openai.fields import Many, refuse_other_content

_SAYS_NOTHING = frozenset({"cache_control", "citations", "caller"})
"""Keys of a block that change nothing here: every prefix is cached as it is, and who called a tool is its caller."""

_NEEDED: Mapping[str, tuple[str, ...]] = {
    "text": ("text",),
    "thinking": ("thinking",),
    "redacted_thinking": (),
    "tool_use": ("id", "name", "input"),
    "tool_result": ("tool_use_id",),
}


def _as_blocks(content: Any) -> Any:
    """A string is one block of text; with one form only, complaints name the very block that is wrong."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class TextBlock(BaseModel):
    """A block where there is only text: in `system`, and in what a tool gave."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, block: Any) -> Any:
        if not isinstance(block, Mapping):
            return block
        kind = block.get("type")
        if isinstance(kind, str) and kind != "text":
            raise InvalidRequest(
                f"Content of type '{kind}' is not supported here: this model reads text only.", param="messages"
            )
        return {name: value for name, value in block.items() if name not in _SAYS_NOTHING}


TextBlocks = Annotated[Many[TextBlock], BeforeValidator(_as_blocks, json_schema_input_type=str | list[TextBlock])]


class Block(BaseModel):
    """A part of a turn: words, earlier thinking, a call, or its result."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text", "thinking", "redacted_thinking", "tool_use", "tool_result"]
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    data: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: TextBlocks | None = None
    is_error: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_what_can_be_read(cls, block: Any) -> Any:
        if not isinstance(block, Mapping):
            return block
        refuse_other_content(block, known=_NEEDED, param="messages")
        return {name: value for name, value in block.items() if name not in _SAYS_NOTHING}

    @model_validator(mode="after")
    def _has_what_its_type_needs(self) -> Block:
        missing = [name for name in _NEEDED[self.type] if getattr(self, name) is None]
        if missing:
            raise InvalidRequest(f"A block of type '{self.type}' needs '{missing[0]}'.", param="messages")
        if self.type == "redacted_thinking" and not ignore(["redacted_thinking"]):
            raise InvalidRequest(
                "A block of type 'redacted_thinking' is another server's, and cannot be read here. Remove it.",
                param="messages",
            )
        return self


class Turn(BaseModel):
    """What one side said."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["user", "assistant", "system"]
    content: Annotated[Many[Block], BeforeValidator(_as_blocks, json_schema_input_type=str | list[Block])]

    @model_validator(mode="after")
    def _blocks_are_of_their_side(self) -> Turn:
        others = {"user": {"text", "tool_result"}, "system": {"text"}}
        allowed = others.get(self.role, _NEEDED.keys() - {"tool_result"})
        wrong = next((block.type for block in self.content if block.type not in allowed), None)
        if wrong is not None:
            raise InvalidRequest(f"A block of type '{wrong}' in a message of role '{self.role}'.", param="messages")
        return self


class ToolDefinition(BaseModel):
    """A tool of the caller's. Whatever `strict` says, a forced call always obeys its schema."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["custom"] | None = None
    name: str = Field(min_length=1)
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_callers_own(cls, tool: Any) -> Any:
        if not isinstance(tool, Mapping):
            return tool
        kind = tool.get("type")
        if isinstance(kind, str) and kind != "custom":
            raise InvalidRequest(
                f"Tools of type '{kind}' are not supported by this server, which runs none; define it with "
                "an input_schema, and run it yourself.",
                param="tools",
            )
        harmless = {"cache_control", "eager_input_streaming", "allowed_callers", "defer_loading", "input_examples"}
        return {name: value for name, value in tool.items() if name not in harmless}

    def for_chat(self) -> dict[str, Any]:
        """The tool as the chat route takes it."""
        function = {"name": self.name, "description": self.description, "parameters": self.input_schema}
        return {"type": "function", "function": {name: one for name, one in function.items() if one is not None}}


def messages_of(system: Sequence[TextBlock] | None, turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """The conversation as messages of the chat route."""
    messages: list[dict[str, Any]] = []
    if system:
        messages.append({"role": "system", "content": _joined(system)})
    for turn in turns:
        for block in turn.content:
            if turn.role == "assistant":
                _append_said(messages, block)
            else:
                _append_told(messages, turn.role, block)
    for message in messages:
        message.setdefault("content", "")
    return messages


def _append_told(messages: list[dict[str, Any]], role: str, block: Block) -> None:
    """Add what a user says or a tool gave; what users say in a row is one message, as with Anthropic."""
    if block.type == "tool_result":
        text = _joined(block.content or ())
        said = f"Error: {text}" if block.is_error else text
        messages.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": said})
    elif messages and messages[-1]["role"] == role == "user":
        messages[-1]["content"] += f"\n{block.text}"
    else:
        messages.append({"role": role, "content": block.text})


def _append_said(messages: list[dict[str, Any]], block: Block) -> None:
    """Add a part of what the model said, which is one message together with what stands beside it."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant"})
    message = messages[-1]
    if block.type == "text":
        message["content"] = message.get("content", "") + (block.text or "")
    elif block.type == "thinking":
        message["reasoning"] = message.get("reasoning", "") + (block.thinking or "")
    elif block.type == "tool_use":
        function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
        message.setdefault("tool_calls", []).append({"id": block.id, "type": "function", "function": function})


def _joined(blocks: Sequence[TextBlock]) -> str:
    return "\n".join(block.text for block in blocks)
