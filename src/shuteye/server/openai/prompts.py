"""Makes token ids of what callers send, without keeping the event loop from other requests.

Knows nothing of sampling or engines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from shuteye.errors import InvalidRequest
from shuteye.server.generation.run import Prompt
from shuteye.server.openai.fields import GenerationBody
from shuteye.server.openai.messages import Message, Tool
from shuteye.server.openai.tool_calls import fallback_tool_prompt
from shuteye.tokenizer import LONG_TEXT, Tokenizer


async def encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool, one_of_many: bool = False) -> list[int]:
    """Token ids of a text; `one_of_many` leaves the event loop for a short one, too."""
    if one_of_many or len(text) > LONG_TEXT:
        return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)
    return tokenizer.encode(text, add_special_tokens=add_special_tokens)


@dataclass(frozen=True, slots=True)
class Truncation:
    """How many tokens of a prompt to keep at most, and which: its last ones, or its first (`side` is "right")."""

    max_tokens: int | None
    side: Literal["left", "right"] = "left"

    def of(self, token_ids: Sequence[int]) -> Sequence[int]:
        """The tokens that are kept."""
        if self.max_tokens is None or len(token_ids) <= self.max_tokens:
            return token_ids
        return token_ids[: self.max_tokens] if self.side == "right" else token_ids[len(token_ids) - self.max_tokens :]


def truncation_of(body: GenerationBody, *, max_model_len: int, max_tokens: int | None) -> Truncation:
    """What the caller asked for; `truncate_prompt_tokens=-1` keeps what leaves room for the output.

    Raises:
        InvalidRequest: nothing of the prompt would be left.
    """
    wanted = body.truncate_prompt_tokens
    if wanted is None and body.truncation_side is not None:
        raise InvalidRequest("truncation_side requires truncate_prompt_tokens.", param="truncation_side")
    if wanted == 0:
        raise InvalidRequest("truncate_prompt_tokens must be -1 or at least 1, got 0.", param="truncate_prompt_tokens")
    if wanted == -1:
        wanted = max(1, max_model_len - (max_tokens or 1))
    return Truncation(wanted, body.truncation_side or "left")


async def prompt_of(
    tokenizer: Tokenizer,
    given: str | Sequence[int],
    *,
    vocab_size: int,
    add_special_tokens: bool,
    want_text: bool,
    truncation: Truncation,
    one_of_many: bool = False,
) -> Prompt:
    """A prompt as the engine takes it; `want_text` decodes one that came as ids, or was cut.

    Raises:
        InvalidRequest: it has no tokens, or a token id that the model does not know.
    """
    if isinstance(given, str):
        encoded = await encode(tokenizer, given, add_special_tokens=add_special_tokens, one_of_many=one_of_many)
        require_tokens(encoded)
        kept = truncation.of(encoded)
        if kept is encoded:
            return Prompt(encoded, given)
    else:
        require_known(given, vocab_size, param="prompt")
        kept = truncation.of(given)
    return Prompt(kept, tokenizer.decode(kept, skip_special_tokens=False) if want_text else None)


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
    raise InvalidRequest(
        f"Token id {unknown} is not in the vocabulary; ids go from 0 to {vocab_size - 1}.", param=param
    )


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
        InvalidRequest: the template refuses the messages, or is told twice about one thing.
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
