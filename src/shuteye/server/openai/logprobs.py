"""Tokens as text and bytes, and log-probabilities in OpenAI's two shapes and vLLM's for prompts.

Knows nothing of requests or streams.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from shuteye.tasks.generate.requests import Logprob
from shuteye.tokenizer import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
_REPLACEMENT = "\ufffd"


def token_text_and_bytes(tokenizer: Tokenizer, token_id: int) -> tuple[str, bytes]:
    r"""What a token stands for; a part of a character reads `bytes:\xe2\x82`, as in OpenAI's answers."""
    text = tokenizer.token_text(token_id)
    if _REPLACEMENT not in text:
        return text, text.encode()
    raw = _raw_bytes(tokenizer.id_to_token(token_id))
    if raw is None:
        return text, text.encode()
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw


def _raw_bytes(token: str | None) -> bytes | None:
    if token is None:
        return None
    if match := _BYTE_TOKEN.match(token):
        return bytes.fromhex(match[1])
    table = _byte_of_char()
    return bytes(table[char] for char in token) if all(char in table for char in token) else None


@cache
def _byte_of_char() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes (openai/gpt-2, encoder.py: bytes_to_unicode), reversed."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


SMALLEST = -9999.0
"""Stands for minus infinity, which JSON cannot say (as in OpenAI's answers)."""


@dataclass(frozen=True, slots=True)
class TokenNames:
    """How tokens are shown: by their text, or, `as_ids`, as `token_id:5` (vLLM's `return_tokens_as_token_ids`)."""

    tokenizer: Tokenizer
    as_ids: bool = False

    def name_and_bytes(self, token_id: int) -> tuple[str, bytes]:
        """What stands for a token, and the bytes it really is."""
        text, raw = token_text_and_bytes(self.tokenizer, token_id)
        return (f"token_id:{token_id}" if self.as_ids else text), raw


def chat_logprobs(
    names: TokenNames, token_ids: Sequence[int], logprobs: Sequence[Mapping[int, Logprob]], *, num_top: int
) -> dict[str, Any]:
    """`choices[].logprobs` of a chat answer; `logprobs[i]` belongs to `token_ids[i]`."""
    content = []
    for token_id, position in zip(token_ids, logprobs, strict=True):
        entry = _entry(names, token_id, position[token_id])
        top = sorted(position.items(), key=lambda item: item[1].rank)
        entry["top_logprobs"] = [_entry(names, other, found) for other, found in top[:num_top]]
        content.append(entry)
    return {"content": content, "refusal": None}


def _entry(names: TokenNames, token_id: int, found: Logprob) -> dict[str, Any]:
    name, raw = names.name_and_bytes(token_id)
    return {"token": name, "logprob": max(found.logprob, SMALLEST), "bytes": list(raw)}


def prompt_logprobs_json(logprobs: Sequence[Mapping[int, Logprob] | None]) -> list[dict[str, Any] | None]:
    """`prompt_logprobs`: per token of the prompt, what is known of it and of likelier ones; null for the first."""
    return [
        None
        if position is None
        else {
            str(token_id): {
                "logprob": max(found.logprob, SMALLEST),
                "rank": found.rank,
                "decoded_token": found.decoded_token,
            }
            for token_id, found in position.items()
        }
        for position in logprobs
    ]


@dataclass(slots=True)
class CompletionLogprobs:
    """`choices[].logprobs` of a completion, built piece by piece; `offset` is where its next token's text begins."""

    names: TokenNames
    offset: int = 0
    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def add(self, token_ids: Sequence[int], logprobs: Sequence[Mapping[int, Logprob] | None]) -> None:
        """Append positions; `logprobs[i]` belongs to `token_ids[i]`, and is None for the first token of a prompt."""
        for token_id, position in zip(token_ids, logprobs, strict=True):
            name, _ = self.names.name_and_bytes(token_id)
            self.tokens.append(name)
            self.token_logprobs.append(None if position is None else max(position[token_id].logprob, SMALLEST))
            self.top_logprobs.append(
                None
                if position is None
                else {
                    self.names.name_and_bytes(other)[0]: max(found.logprob, SMALLEST)
                    for other, found in position.items()
                }
            )
            self.text_offset.append(self.offset)
            self.offset += len(token_text_and_bytes(self.names.tokenizer, token_id)[0])

    def take(self) -> dict[str, Any]:
        """What was added since the last `take`, in OpenAI's shape."""
        taken = {
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        }
        self.tokens, self.token_logprobs, self.top_logprobs, self.text_offset = [], [], [], []
        return taken
