"""The events of a transcript that is streamed: each one is OpenAI's event and vLLM's chunk at once.

OpenAI's clients read `type` and `delta`, vLLM's `choices`; neither looks at the keys of the other.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Literal

from msgspec import UNSET, Struct, UnsetType
from msgspec.structs import replace

from shuteye.server.http.answers import encode_json
from shuteye.server.http.events import event
from shuteye.server.openai.transcripts import DurationUsage, duration_of
from shuteye.tasks.transcribe.requests import Transcription


class TranscribedDelta(Struct):
    """What is new of the text."""

    content: str


class TranscribedChoice(Struct):
    """The only choice of vLLM's chunk."""

    delta: TranscribedDelta
    finish_reason: str | None = None
    stop_reason: str | None = None


class TokenUsage(Struct):
    """Tokens so far."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TextDelta(Struct, tag_field="type", tag="transcript.text.delta", kw_only=True):
    """New text of a stream."""

    delta: str
    id: str
    object: Literal["transcription.chunk"] = "transcription.chunk"
    created: int
    model: str
    choices: list[TranscribedChoice]
    usage: TokenUsage | UnsetType = UNSET


class TextDone(Struct, tag_field="type", tag="transcript.text.done", kw_only=True):
    """The end of a stream: the whole text again. With counts of tokens it has no choice, as vLLM's last chunk."""

    text: str
    usage: DurationUsage
    id: str
    object: Literal["transcription.chunk"] = "transcription.chunk"
    created: int
    model: str
    choices: list[TranscribedChoice]


def _tokens(output: Transcription) -> TokenUsage:
    read, said = output.num_prompt_tokens, output.num_tokens
    return TokenUsage(read, said, read + said)


@dataclass(frozen=True, slots=True)
class TranscriptEvents:
    """Writes one stream.

    Attributes:
        tokens_at_end: count tokens in the last event; `tokens_everywhere`, in all others.
    """

    stream_id: str
    model: str
    tokens_at_end: bool
    tokens_everywhere: bool
    created: int = field(default_factory=lambda: int(time.time()))

    async def of(self, first: Transcription, rest: AsyncGenerator[Transcription, None]) -> AsyncGenerator[bytes, None]:
        """An event for each output that has text, and one at the end."""
        texts: list[str] = []
        output: Transcription | None = first
        while output is not None:
            if output.text:
                texts.append(output.text)
                yield event(encode_json(self._delta(output)))
            if output.finished:
                yield event(encode_json(self._done("".join(texts), output)))
            output = await anext(rest, None)

    def _delta(self, output: Transcription) -> TextDelta:
        return TextDelta(
            delta=output.text,
            id=self.stream_id,
            created=self.created,
            model=self.model,
            choices=[TranscribedChoice(TranscribedDelta(output.text))],
            usage=_tokens(output) if self.tokens_everywhere else UNSET,
        )

    def _done(self, text: str, output: Transcription) -> TextDone:
        usage, tokens = duration_of(output), _tokens(output)
        if self.tokens_at_end:
            counts = {name: getattr(tokens, name) for name in tokens.__struct_fields__}
            usage = replace(usage, **counts)
        return TextDone(
            text=text,
            usage=usage,
            id=self.stream_id,
            created=self.created,
            model=self.model,
            choices=[] if self.tokens_at_end else [TranscribedChoice(TranscribedDelta(""), "stop")],
        )
