"""Log-probabilities in OpenAI's two shapes: one for chat, one for completions.

Knows nothing of requests or streams.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shuteye.outputs import Logprob
from shuteye.server.protocol.token_text import token_text_and_bytes
from shuteye.tokenizer import Tokenizer

SMALLEST = -9999.0
"""Stands for minus infinity, which JSON cannot say (as in OpenAI's answers)."""


def chat_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[Mapping[int, Logprob]], *, num_top: int
) -> dict[str, Any]:
    """`choices[].logprobs` of a chat answer; `logprobs[i]` belongs to `token_ids[i]`."""
    content = []
    for token_id, position in zip(token_ids, logprobs, strict=True):
        entry = _entry(tokenizer, token_id, position[token_id])
        top = sorted(position.items(), key=lambda item: item[1].rank)
        entry["top_logprobs"] = [_entry(tokenizer, other, found) for other, found in top[:num_top]]
        content.append(entry)
    return {"content": content, "refusal": None}


def _entry(tokenizer: Tokenizer, token_id: int, found: Logprob) -> dict[str, Any]:
    text, raw = token_text_and_bytes(tokenizer, token_id)
    return {"token": text, "logprob": max(found.logprob, SMALLEST), "bytes": list(raw)}


@dataclass(slots=True)
class CompletionLogprobs:
    """`choices[].logprobs` of a completion, built piece by piece; `offset` is where its next token's text begins."""

    tokenizer: Tokenizer
    offset: int = 0
    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[str, float]] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def add(self, token_ids: Sequence[int], logprobs: Sequence[Mapping[int, Logprob]]) -> None:
        """Append positions; `logprobs[i]` belongs to `token_ids[i]`."""
        for token_id, position in zip(token_ids, logprobs, strict=True):
            text = self._text(token_id)
            self.tokens.append(text)
            self.token_logprobs.append(max(position[token_id].logprob, SMALLEST))
            self.top_logprobs.append(
                {self._text(other): max(found.logprob, SMALLEST) for other, found in position.items()}
            )
            self.text_offset.append(self.offset)
            self.offset += len(text)

    def _text(self, token_id: int) -> str:
        return token_text_and_bytes(self.tokenizer, token_id)[0]

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
