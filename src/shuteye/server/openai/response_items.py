"""What a conversation on /v1/responses consists of, item by item, and the messages that it stands for.

Knows nothing of the answer, nor of how long a conversation may be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

from shuteye.errors import InvalidRequest
from shuteye.server.http.ignored_fields import ignore
from shuteye.server.openai.fields import Many


class Part(BaseModel):
    """A part of a message's content; only text can be read. What an output carries beside its text is not needed."""

    model_config = ConfigDict(extra="ignore", strict=True)

    type: Literal["input_text", "output_text", "text", "reasoning_text", "summary_text"]
    text: str


def _as_parts(content: Any) -> Any:
    """A string is one part of text; with one form only, complaints name the very part that is wrong."""
    return [{"type": "input_text", "text": content}] if isinstance(content, str) else content


Parts = Annotated[Many[Part], BeforeValidator(_as_parts, json_schema_input_type=str | list[Part])]


class Item(BaseModel):
    """One item of a conversation: a message, a call, its result, or earlier reasoning."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    id: str | None = None
    status: str | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Parts | None = None
    phase: str | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: Parts | None = None
    summary: Many[Part] | None = None
    encrypted_content: str | None = None

    @model_validator(mode="after")
    def _has_what_its_type_needs(self) -> Item:
        needed = {
            "message": ("role", "content"),
            "function_call": ("call_id", "name", "arguments"),
            "function_call_output": ("call_id", "output"),
            "reasoning": (),
        }[self.type]
        missing = [name for name in needed if getattr(self, name) is None]
        if missing:
            raise InvalidRequest(f"An item of type '{self.type}' in input needs '{missing[0]}'.", param="input")
        if self.encrypted_content and not ignore(["input.encrypted_content"]):
            raise InvalidRequest(
                "'encrypted_content' in input is another server's, and cannot be read here. Remove it.", param="input"
            )
        return self

    @property
    def is_instruction(self) -> bool:
        """Whether it says how to answer, and is no turn of the conversation."""
        return self.role in {"system", "developer"}


def messages_of(instructions: str | None, items: Sequence[Item]) -> list[dict[str, Any]]:
    """The conversation as messages of the chat route."""
    messages: list[dict[str, Any]] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    for item in items:
        _append(messages, item)
    for message in messages:
        if "content" not in message and "tool_calls" not in message:  # reasoning that led to nothing
            message["content"] = ""
    return messages


def _append(messages: list[dict[str, Any]], item: Item) -> None:
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
    elif thought := _joined(item.content or item.summary):
        messages.append({"role": "assistant", "reasoning": thought})


def _joined(parts: Sequence[Part] | None) -> str:
    return "\n".join(part.text for part in parts or ())


# --- conversations that are too long ------------------------------------------------------------


def possible_starts(items: Sequence[Item]) -> tuple[list[int], list[int]]:
    """Where a conversation may begin when its oldest items are dropped, all of it being too long.

    A call's result never stays without the call.

    Returns:
        items[i] that a user says, and the places after the last of these, both in order; never 0.
    """
    called_at = {item.call_id: index for index, item in enumerate(items) if item.type == "function_call"}
    starts: list[int] = []
    first_needed = len(items)
    for index in range(len(items) - 1, 0, -1):
        item = items[index]
        if item.type == "function_call_output":
            first_needed = min(first_needed, called_at.get(item.call_id, index))
        if index <= first_needed and not item.is_instruction:
            starts.append(index)
    starts.reverse()
    of_user = [index for index in starts if items[index].role == "user"]
    last = of_user[-1] if of_user else 0
    return of_user, [index for index in starts if index > last]


def begun_at(items: Sequence[Item], start: int) -> list[Item]:
    """The conversation from an item on; messages that say how to answer stay."""
    return [*(item for item in items[:start] if item.is_instruction), *items[start:]]
