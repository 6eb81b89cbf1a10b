"""What a caller asks of a model that transcribes, validated once, and what comes of it. Plain data; no torch."""

from __future__ import annotations

from dataclasses import dataclass

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
        language: its English name, once known.
        num_tokens: tokens sampled for the request so far, timestamps included.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    segments: tuple[TranscribedTokens, ...] = ()
    language: str | None = None
    num_tokens: int = 0
    finished: bool = False


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
        language: its English name, given or found out.
        duration: of the audio, in seconds.
        segments: none where they were not asked for and the audio is short, but for one that is all of it.
        num_tokens: tokens that the model sampled.
    """

    request_id: str
    text: str
    language: str | None
    duration: float
    segments: tuple[TranscriptSegment, ...]
    num_tokens: int
    finished: bool


@dataclass(frozen=True, slots=True)
class TranscribeParams:
    """How speech is written down; field meanings as in OpenAI's transcription API.

    Attributes:
        language: ISO 639-1 code or English name of what is spoken; None has the model find out.
        temperature: 0 is greedy.
        timestamps: whether segments are told apart. Audio that does not fit the model's window at once always has them.

    Raises:
        InvalidRequest: a value is of another type or out of range; `param` names it.
    """

    language: str | None = None
    temperature: float = 0.0
    seed: int = 0
    timestamps: bool = False

    def __post_init__(self) -> None:
        settle_types(self)
        require(0.0 <= self.temperature <= 1.0, "temperature", "between 0 and 1", self.temperature)
        require(0 <= self.seed < 2**63, "seed", "between 0 and 2^63 - 1", self.seed)


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
