"""Makes token ids of texts and conversations without holding up the event loop; refuses what is no prompt.

Knows nothing of sampling or engines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from shuteye.errors import InvalidRequest, PromptTooLong
from shuteye.server.http.bodies import parsed
from shuteye.server.openai.fields import Many, one_message, refuse_other_content
from shuteye.server.openai.tools import Tool, ToolCall, fallback_tool_prompt
from shuteye.tokenizer import LONG_TEXT, Tokenizer


async def encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool, one_of_many: bool = False) -> list[int]:
    """Token ids of a text; `one_of_many` leaves the event loop for a short one, too."""
    if one_of_many or len(text) > LONG_TEXT:
        return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)
    return tokenizer.encode(text, add_special_tokens=add_special_tokens)


def require_tokens(token_ids: Sequence[int], *, param: str = "prompt") -> None:
    """Refuse a prompt without any token.

    Raises:
        InvalidRequest: there is none.
    """
    if not token_ids:
        raise InvalidRequest(f"The {param} has no tokens; send at least one.", param=param)


def require_known(token_ids: Sequence[int], vocab_size: int, *, param: str) -> None:
    """Refuse ids that the model has no embedding for.

    Raises:
        InvalidRequest: names the first such id.
    """
    if not token_ids or (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        return
    unknown = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
    raise InvalidRequest(f"Token id {unknown} is out of vocabulary; ids go from 0 to {vocab_size - 1}.", param=param)


def require_room(num_prompt_tokens: int, max_tokens: int | None, max_model_len: int) -> None:
    """Refuse what the context can never hold.

    Raises:
        PromptTooLong: says how many tokens there are, were asked for, and fit.
    """
    wanted = num_prompt_tokens + (1 if max_tokens is None else max_tokens)
    if wanted <= max_model_len:
        return
    asked = "" if max_tokens is None else f" and {max_tokens} were asked for"
    raise PromptTooLong(
        f"This model's maximum context length is {max_model_len} tokens. However, the prompt has {num_prompt_tokens}"
        f"{asked}. Shorten the prompt or lower max_tokens.",
        param="max_tokens" if num_prompt_tokens < max_model_len else "prompt",
    )


# --- conversations ------------------------------------------------------------------------------

Role = Annotated[str, Field(min_length=1, max_length=64)]
"""Any that a template may know: besides OpenAI's, models have been trained with roles of their own."""

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
        refuse_other_content(part, param="messages")
        if isinstance(part, Mapping) and "cache_control" in part:  # every prefix is cached as it is
            return {name: value for name, value in part.items() if name != "cache_control"}
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
        thought = self.reasoning or self.reasoning_content
        if thought is not None:  # templates read one of these names or the other
            message |= {"reasoning": thought, "reasoning_content": thought}
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


async def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    template_kwargs: Mapping[str, Any],
    tools: Sequence[Tool] = (),
    continue_final_message: bool = False,
) -> str:
    """The prompt text of a conversation, by the checkpoint's template; tools in plain words if it has none for them.

    Raises:
        InvalidRequest: the template refuses the messages, or one of its fields is given twice.
    """
    reserved = {"messages", "add_generation_prompt", "tokenize"} & template_kwargs.keys()
    if reserved:
        raise InvalidRequest(
            f"chat_template_kwargs must not set {sorted(reserved)}; these are fields of the request.",
            param="chat_template_kwargs",
        )
    conversation: Sequence[Mapping[str, Any]] = [message.for_template() for message in messages]
    described = [tool.for_template() for tool in tools]
    if described and tokenizer.template_reads("tools", with_tools=True):
        template_kwargs = {**template_kwargs, "tools": described}
    elif described or _speaks_of_tools(messages, tokenizer):
        conversation = fallback_tool_prompt(conversation, described)
    text = await _rendered(
        tokenizer, conversation, messages, add_generation_prompt=add_generation_prompt, **template_kwargs
    )
    return _open_ended(text, conversation[-1]) if continue_final_message else text


def _speaks_of_tools(messages: Sequence[Message], tokenizer: Tokenizer) -> bool:
    """Whether there are calls and results in the conversation for which the template has no words."""
    mentioned = any(message.tool_calls or message.role == "tool" for message in messages)
    return mentioned and not tokenizer.template_reads("tools", with_tools=True)


def _open_ended(text: str, final: Mapping[str, Any]) -> str:
    """The text up to the end of the final message's content, so that the model goes on with it.

    Raises:
        InvalidRequest: the template does not show that content as it is.
    """
    content = final.get("content")
    if isinstance(content, list):
        content = content[-1]["text"] if content else ""
    begin = text.rfind((content or "").strip())
    if not content or begin < 0:
        raise InvalidRequest(
            "continue_final_message needs a final message whose content the template shows as it is.",
            param="continue_final_message",
        )
    end = begin + len(content.strip())
    trailing = content[len(content.rstrip()) :]
    return text[:end] + (trailing if text.startswith(trailing, end) else "")


async def _rendered(
    tokenizer: Tokenizer,
    conversation: Sequence[Mapping[str, Any]],
    messages: Sequence[Message],
    /,
    *,
    add_generation_prompt: bool,
    **template_kwargs: Any,
) -> str:
    length = sum(len(message.content) if isinstance(message.content, str) else LONG_TEXT for message in messages)
    if length > LONG_TEXT:
        return await asyncio.to_thread(
            tokenizer.apply_chat_template, conversation, add_generation_prompt=add_generation_prompt, **template_kwargs
        )
    return tokenizer.apply_chat_template(conversation, add_generation_prompt=add_generation_prompt, **template_kwargs)
