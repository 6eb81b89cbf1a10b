"""Makes token ids of what callers send, without keeping the event loop from other requests.

Knows nothing of sampling or engines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from shuteye.errors import InvalidRequest
from shuteye.server.generation import Prompt
from shuteye.server.protocol.messages import Message
from shuteye.tokenizer import Tokenizer

LONG_TEXT = 8192
"""Characters beyond which encoding (about 1 µs each) moves to a thread; tokenizers releases the GIL."""


async def encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    """Token ids of a text."""
    if len(text) > LONG_TEXT:
        return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)
    return tokenizer.encode(text, add_special_tokens=add_special_tokens)


async def prompt_of(
    tokenizer: Tokenizer, given: str | Sequence[int], *, vocab_size: int, add_special_tokens: bool, want_text: bool
) -> Prompt:
    """A prompt as the engine takes it; `want_text` decodes one that came as ids.

    Raises:
        InvalidRequest: it has no tokens, or a token id that the model does not know.
    """
    if isinstance(given, str):
        token_ids = await encode(tokenizer, given, add_special_tokens=add_special_tokens)
        require_tokens(token_ids)
        return Prompt(token_ids, given)
    require_known(given, vocab_size, param="prompt")
    return Prompt(given, tokenizer.decode(given, skip_special_tokens=False) if want_text else None)


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
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"Token id {token_id} is not in the vocabulary; ids go from 0 to {vocab_size - 1}.", param=param
            )


async def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    template_kwargs: Mapping[str, Any],
) -> str:
    """The prompt text of a conversation, by the checkpoint's template.

    Raises:
        InvalidRequest: the template refuses the messages, or is told twice about one thing.
    """
    reserved = {"messages", "add_generation_prompt", "tokenize"} & template_kwargs.keys()
    if reserved:
        raise InvalidRequest(
            f"chat_template_kwargs must not set {sorted(reserved)}; these are fields of the request.",
            param="chat_template_kwargs",
        )
    conversation = [message.for_template() for message in messages]
    length = sum(len(message.content) if isinstance(message.content, str) else LONG_TEXT for message in messages)
    if length > LONG_TEXT:
        return await asyncio.to_thread(
            tokenizer.apply_chat_template, conversation, add_generation_prompt=add_generation_prompt, **template_kwargs
        )
    return tokenizer.apply_chat_template(conversation, add_generation_prompt=add_generation_prompt, **template_kwargs)
