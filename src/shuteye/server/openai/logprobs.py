"""Tokens as text and bytes, and log-probabilities in OpenAI's two shapes and vLLM's for prompts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from msgspec import Struct

from shuteye.server.parsing.pieces import Content, Piece
from shuteye.tasks.generate.requests import WHOLE_VOCABULARY, CompletionOutput, Logprob
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


class TopLogprob(Struct):
    """What stands for a token, and how likely it was."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(Struct):
    """A token, and the top k in its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    """`choices[].logprobs` of a chat answer."""

    content: list[ChatLogprob]
    refusal: None = None


def chat_logprobs(
    names: TokenNames, token_ids: Sequence[int], logprobs: Sequence[Mapping[int, Logprob]], *, num_top: int
) -> ChatLogprobs:
    """`choices[].logprobs` of a chat answer; `logprobs[i]` belongs to `token_ids[i]`, and -1 shows all of it."""
    shown = None if num_top == WHOLE_VOCABULARY else num_top
    content = []
    for token_id, position in zip(token_ids, logprobs, strict=True):
        ranked = sorted(position.items(), key=lambda item: item[1].rank)
        top_k = [TopLogprob(*_entry(names, other, found)) for other, found in ranked[:shown]]
        content.append(ChatLogprob(*_entry(names, token_id, position[token_id]), top_k))
    return ChatLogprobs(content)


def _entry(names: TokenNames, token_id: int, found: Logprob) -> tuple[str, float, list[int]]:
    name, raw = names.name_and_bytes(token_id)
    return name, max(found.logprob, SMALLEST), list(raw)


class TextLogprobs:
    """Log-probabilities of the tokens that words are made of; those of reasoning and of calls are not told.

    Args:
        num_top: alternatives per token; None if there are to be no log-probabilities at all.
    """

    def __init__(self, names: TokenNames, *, num_top: int | None) -> None:
        self._names = names
        self._num_top = num_top
        self._waiting: list[tuple[int, ChatLogprob]] = []  # how many bytes of text a token is, and what is told of it

    def of_words(self, delta: CompletionOutput, pieces: Sequence[Piece]) -> Sequence[ChatLogprob]:
        """Of the words among `pieces`, which are what is new to tell after this delta.

        Tokens wait until there is something to tell. Then the last of them are the words', as far as these have text
        for; before them are those of markers, of reasoning and of calls.
        """
        if self._num_top is None:
            return ()
        told = chat_logprobs(self._names, delta.token_ids, delta.logprobs or (), num_top=self._num_top).content
        for token_id, one in zip(delta.token_ids, told, strict=True):
            self._waiting.append((0 if self._names.tokenizer.is_special(token_id) else len(one.bytes), one))
        if not pieces:
            return ()
        waiting, self._waiting = self._waiting, []
        left = sum(len(piece.text.encode()) for piece in pieces if isinstance(piece, Content))
        begin = len(waiting)
        while begin and left > 0:
            begin -= 1
            left -= waiting[begin][0]
        return [one for _nbytes, one in waiting[begin:]]


class PromptLogprob(Struct):
    """What is known of one token in its place (vLLM's shape)."""

    logprob: float
    rank: int
    decoded_token: str | None


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""`prompt_logprobs`: per token of the prompt, by token id, that token and likelier ones; null for the first."""


def prompt_logprobs(logprobs: Sequence[Mapping[int, Logprob] | None]) -> PromptLogprobs:
    """`prompt_logprobs`, made of what the engine found."""
    return [
        None
        if position is None
        else {
            str(token_id): PromptLogprob(max(found.logprob, SMALLEST), found.rank, found.decoded_token)
            for token_id, found in position.items()
        }
        for position in logprobs
    ]


class CompletionLogprobs(Struct):
    """`choices[].logprobs` of a completion: four lists, each with one entry a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


@dataclass(slots=True)
class TextOffset:
    """Writes `choices[].logprobs` of a completion, piece by piece; `at` is where its next token's text begins."""

    names: TokenNames
    at: int = 0

    def logprobs(
        self, token_ids: Sequence[int], positions: Sequence[Mapping[int, Logprob] | None]
    ) -> CompletionLogprobs:
        """The next tokens; `positions[i]` belongs to `token_ids[i]`, and is None for the first token of a prompt."""
        made = CompletionLogprobs([], [], [], [])
        for token_id, position in zip(token_ids, positions, strict=True):
            made.tokens.append(self.names.name_and_bytes(token_id)[0])
            made.text_offset.append(self.at)
            made.token_logprobs.append(None if position is None else max(position[token_id].logprob, SMALLEST))
            made.top_logprobs.append(
                None
                if position is None
                else {
                    self.names.name_and_bytes(other)[0]: max(found.logprob, SMALLEST)
                    for other, found in position.items()
                }
            )
            self.at += len(token_text_and_bytes(self.names.tokenizer, token_id)[0])
        return made
