"""Chat messages as OpenAI's clients send them: text, or parts that are all text.

Knows nothing of templates; what cannot be shown to the model is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from shuteye.errors import InvalidRequest
from shuteye.server.protocol.fields import one_message

Role = Literal["system", "developer", "user", "assistant", "tool", "function"]

_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "tool_calls": ([],), "tool_call_id": (), "function_call": (), "audio": (), "refusal": (), "annotations": ([],),
    "reasoning": (), "reasoning_content": (), "reasoning_details": ([],), "prefix": (False,),
}  # fmt: skip
"""What clients send along with an assistant's message, and the values that say nothing; null is always one."""


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
    """One message of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Role
    content: str | list[TextPart]
    name: str | None = None

    _content_message = field_validator("content", mode="wrap")(one_message("a string or a list of text parts"))

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_shown(cls, message: Any) -> Any:
        if not isinstance(message, Mapping):
            return message
        return {name: value for name, value in message.items() if not _says_nothing(name, value)}

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates read it; `developer` is what `system` was called before OpenAI's o1."""
        role = "system" if self.role == "developer" else self.role
        return {**self.model_dump(exclude_none=True), "role": role}


def _says_nothing(name: str, value: object) -> bool:
    if name not in _NEUTRAL:
        return False
    if value is None or value in _NEUTRAL[name]:
        return True
    raise InvalidRequest(f"'{name}' in a message is not supported by this server.", param="messages")
