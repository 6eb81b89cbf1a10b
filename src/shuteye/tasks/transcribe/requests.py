"""What a caller asks of a model that transcribes, validated once, and what comes of it. Plain data; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

from shuteye.typed_fields import require, settle_types


@dataclass(frozen=True, slots=True)
class TranscribedTokens:
    """A stretch of speech, as its tokens (text alone, no timestamps). Times are in seconds.

    Attributes:
        seek: start of the window it was found in, in hundredths of a second (Whisper's frames).
        avg_logprob: mean log-probability of the window's tokens.
        no_speech_prob: how likely the window holds no speech.
    """

    start: float
    end: float
    token_ids: tuple[int, ...]
    seek: int
    temperature: float
    avg_logprob: float
    no_speech_prob: float


class TranscriptDelta(msgspec.Struct, frozen=True, tag=True):
    """What is new of a transcription: final tokens of text as soon as they are, segments once their window has ended.

    Attributes:
        language: its ISO 639-1 code, once known.
        num_tokens: tokens sampled for the request so far, timestamps included.
        num_prompt_tokens: tokens that its windows began with.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    segments: tuple[TranscribedTokens, ...] = ()
    language: str | None = None
    num_tokens: int = 0
    finished: bool = False
    num_prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TranscriptSegment:
    """A stretch of speech (OpenAI's shape); times in seconds, `seek` in hundredths.

    Attributes:
        id: its number in the transcript.
        compression_ratio: of its text by zlib; much above 2 means that the model repeats itself.
        avg_logprob, no_speech_prob: of the whole window of audio that the model encoded at once.
    """

    id: int
    start: float
    end: float
    text: str
    token_ids: tuple[int, ...]
    seek: int
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float


@dataclass(frozen=True, slots=True)
class Transcription:
    """What was said in one piece of audio, so far or for good.

    Attributes:
        language: its ISO 639-1 code, given or found out.
        duration: of the audio, in seconds.
        segments: none where they were not asked for and the audio is short, but for one that is all of it.
        num_tokens: tokens that the model sampled.
        num_prompt_tokens: tokens that it was given before each window.
    """

    request_id: str
    text: str
    language: str | None
    duration: float
    segments: tuple[TranscriptSegment, ...]
    num_tokens: int
    finished: bool
    num_prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TranscribeParams:
    """How speech is written down; field meanings as in OpenAI's transcription API, of sampling as in vLLM's.

    Attributes:
        language: ISO 639-1 code or English name of what is spoken; None has the model find out.
        temperature: 0 is greedy.
        timestamps: whether segments are told apart. Audio that does not fit the model's window at once always has them.
        task: "translate" writes down in English what was said in another language.
        max_tokens: most tokens that are sampled, of all windows together, timestamps included; None sets no limit.
        top_p, top_k, min_p: which tokens may be drawn at a temperature above 0; None, or a `top_k` below 1, is all.
        repetition_penalty, presence_penalty, frequency_penalty: against text tokens that the window has already.

    Raises:
        InvalidRequest: a value is of another type or out of range; `param` names it.
    """

    language: str | None = None
    temperature: float = 0.0
    seed: int = 0
    timestamps: bool = False
    task: Literal["transcribe", "translate"] = "transcribe"
    max_tokens: int | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        settle_types(self)
        require(0.0 <= self.temperature <= 1.0, "temperature", "between 0 and 1", self.temperature)
        require(0 <= self.seed < 2**63, "seed", "between 0 and 2^63 - 1", self.seed)
        require(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "at least 1", self.max_tokens)
        require(self.top_p is None or 0.0 < self.top_p <= 1.0, "top_p", "in (0, 1]", self.top_p)
        require(self.top_k is None or self.top_k >= -1, "top_k", "at least -1", self.top_k)
        require(self.min_p is None or 0.0 <= self.min_p <= 1.0, "min_p", "in [0, 1]", self.min_p)
        penalty = self.repetition_penalty
        require(0.0 < penalty <= 10.0, "repetition_penalty", "in (0, 10]", penalty)
        for name in ("presence_penalty", "frequency_penalty"):
            require(-2.0 <= getattr(self, name) <= 2.0, name, "between -2 and 2", getattr(self, name))

    @property
    def has_penalties(self) -> bool:
        """Whether tokens that were said are to be said less often, or more."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


class TranscribeRequest(msgspec.Struct, frozen=True, tag=True):
    """One piece of audio to transcribe.

    Attributes:
        pcm: mono samples, float32, little-endian, at `audio.SAMPLE_RATE`.
        prompt_token_ids: what is to be taken for the text before it; only the last ones count.
    """

    request_id: str
    pcm: bytes
    prompt_token_ids: tuple[int, ...] = ()
    params: TranscribeParams = msgspec.field(default_factory=TranscribeParams)
