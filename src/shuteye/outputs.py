"""What the engine answers: completions, transition reports and the state it pushes. Plain frozen data.

Knows nothing of how any of it was made; no torch.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort"]
Tag = Literal["weights", "kv_cache"]
TAGS: tuple[Tag, ...] = ("weights", "kv_cache")

Residency = Literal["resident", "offloaded", "discarded", "blank"]
"""Where a tag's bytes are: in memory; in a backing; nowhere; mapped, but not yet written."""

Gate = Literal["open", "draining", "closed"]


# --- generation ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's log-probability, and its rank in the vocabulary (1 is the likeliest)."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position: the chosen token's first, then the likeliest ones."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """An error on its way between processes; `errors.rebuild` makes the exception again."""

    kind: str
    message: str
    param: str | None = None


class RequestDelta(msgspec.Struct, frozen=True, tag=True):
    """What one engine step did for one request, and how requests of every kind are aborted or fail.

    `finish_reason` or `error` ends the request; `stop_token_id` is the token that did, if one did. `prompt_logprobs`
    are of the prompt's tokens from the second on, as many as became known.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int = 0
    error: ErrorInfo | None = None

    @property
    def finished(self) -> bool:
        """True if nothing more will come for this request."""
        return self.finish_reason is not None or self.error is not None


class PooledDelta(msgspec.Struct, frozen=True, tag=True):
    """All that a `PoolRequest` asked for; it ends the request. `rows` are float32, one per input, in their order."""

    request_id: str
    rows: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class SpokenTokens:
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
    segments: tuple[SpokenTokens, ...] = ()
    language: str | None = None
    num_tokens: int = 0
    finished: bool = False


Delta = RequestDelta | PooledDelta | TranscriptDelta
"""What a step may have done for a request, by the kind of request."""


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One completion of a prompt (vLLM's shape)."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: tuple[dict[int, Logprob], ...] | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """All completions of one prompt, so far or for good (vLLM's shape).

    `scheduled_at` is when it first got its place in the batch, in seconds of the system's monotonic clock.
    `prompt_logprobs`, if asked for, are there as soon as the whole prompt is computed; the first token has none.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    num_cached_tokens: int = 0
    scheduled_at: float | None = None
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None


# --- embeddings and scores ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PooledOutput:
    """What came of one `PoolRequest`: a row of float32 per input, in order; `scheduled_at` as in RequestOutput."""

    request_id: str
    rows: tuple[bytes, ...]
    finished: bool = True
    scheduled_at: float | None = None


@dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    """One embedding, as the bytes of its float32 numbers in this machine's order."""

    data: bytes

    @property
    def embedding(self) -> list[float]:
        """The numbers."""
        return array("f", self.data).tolist()


@dataclass(frozen=True, slots=True)
class EmbeddingRequestOutput:
    """The embedding of one prompt (vLLM's shape)."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    outputs: EmbeddingOutput
    finished: bool = True
    scheduled_at: float | None = None


@dataclass(frozen=True, slots=True)
class ScoringOutput:
    """How well two texts go together."""

    score: float


@dataclass(frozen=True, slots=True)
class ScoringRequestOutput:
    """The score of one pair (vLLM's shape). For an embedding model `prompt_token_ids` are both texts', in turn."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    outputs: ScoringOutput
    finished: bool = True
    scheduled_at: float | None = None


@dataclass(frozen=True, slots=True)
class TranscriptSegment:
    """A stretch of speech (OpenAI's shape); times in seconds, `seek` in hundredths.

    Attributes:
        id: its number in the transcript.
        compression_ratio: of its text by zlib; much above 2 means that the model repeats itself.
        avg_logprob, no_speech_prob: of the whole window of audio that the model heard at once.
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
    """What was said in one recording, so far or for good.

    Attributes:
        language: its English name, given or found out.
        duration: of the recording, in seconds.
        segments: none where they were not asked for and the recording is short, but for one that is all of it.
        num_tokens: tokens that the model sampled.
    """

    request_id: str
    text: str
    language: str | None
    duration: float
    segments: tuple[TranscriptSegment, ...]
    num_tokens: int
    finished: bool


# --- sleep and wake -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TagReport:
    """What one transition did to one tag, in bytes the operating system or driver reported.

    Attributes:
        residency: where the tag's bytes are now.
        backing: what can restore them: `image`, `disk`, `host`, or None.
        freed_bytes: physical memory that left the process (sleep).
        restored_bytes: physical memory mapped again (wake).
        saved_bytes: bytes copied into the backing because they had been written.
    """

    tag: Tag
    residency: Residency
    backing: str | None = None
    freed_bytes: int = 0
    restored_bytes: int = 0
    saved_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class SleepReport:
    """The measured outcome of `sleep`; `residual_bytes` is what stays resident in the process."""

    changed: bool
    level: int
    tags: tuple[TagReport, ...] = ()
    freed_bytes: int = 0
    residual_bytes: int = 0
    seconds: float = 0.0
    aborted_requests: int = 0
    held_requests: int = 0


@dataclass(frozen=True, slots=True)
class WakeReport:
    """The measured outcome of `wake_up`.

    `verified` says what was checked before the gate opened (`off`, `sample`, `full`, and whether the canary ran);
    `missing` names tensors that must still be written before it can open.
    """

    changed: bool
    tags: tuple[TagReport, ...] = ()
    restored_bytes: int = 0
    verified: str = "off"
    verified_bytes: int = 0
    canary: bool = False
    weights_source: str | None = None
    missing: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """The outcome of `update_weights` or `reload_weights`; `missing` must be written before the gate can open."""

    updated: int
    updated_bytes: int
    missing: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """Counters since start (`num_*_total`) and gauges now, for `/metrics`."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_prompt_tokens_total: int = 0
    num_generation_tokens_total: int = 0
    num_prefix_queries_total: int = 0
    num_prefix_hits_total: int = 0
    num_preemptions_total: int = 0


@dataclass(frozen=True, slots=True)
class TagState:
    """Where a tag is, and what waking it would cost."""

    tag: Tag
    residency: Residency
    backing: str | None
    nbytes: int
    resident_bytes: int


@dataclass(frozen=True, slots=True)
class EngineState:
    """The sleep state that the engine pushes to whoever admits requests.

    Attributes:
        gate: whether requests run.
        paused: a `pause()` is in force; waking never undoes it.
        refusing: new requests are refused, by a pause that ended those in flight, or is about to.
        level: the deepest level asleep at, or None when awake.
        missing: tensors that must be written before the gate can open.
        faulted: why nothing can be served, or None.
    """

    gate: Gate = "closed"
    paused: bool = False
    level: int | None = None
    tags: tuple[TagState, ...] = ()
    missing: tuple[str, ...] = ()
    faulted: str | None = None
    transition: str | None = None
    refusing: bool = False

    @property
    def is_sleeping(self) -> bool:
        """True until every tag is resident and loaded."""
        return any(tag.residency != "resident" for tag in self.tags)


@dataclass(frozen=True, slots=True)
class PoolingInfo:
    """What a model that embeds or scores makes of one input.

    Attributes:
        size: numbers per input: the length of an embedding, or 1 for a score.
        normalized: whether embeddings have length 1 unless the caller asks otherwise.
        dimensions: lengths that an embedding may be cut to; empty if none, None if any.
    """

    size: int
    normalized: bool = False
    dimensions: tuple[int, ...] | None = ()


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a frontend must know of the loaded model. Paths are strings so that it can travel.

    Attributes:
        tokenizer_dir: holds tokenizer.json, tokenizer_config.json and the chat template.
        image_dir: the weight image in use.
        kv_bytes_per_token: KV cache bytes of one token on one rank, all layers; 0 without a KV cache.
        pooling: what a model that embeds or scores makes of an input; None for the others.
        source: where the weights come from, such as `hub: owner/name at 12fd25f77366` or `path: /models/x`.
        source_format: how they were stored there, such as `GGUF Q4_1`; `dtype` is what they are served in.
    """

    model: str
    architecture: str
    task: str
    tokenizer_dir: str
    image_dir: str
    dtype: str
    vocab_size: int
    max_model_len: int
    block_size: int
    num_blocks: int
    eos_token_ids: tuple[int, ...]
    weights_bytes: int
    kv_cache_bytes: int
    kv_bytes_per_token: int
    default_sampling: dict[str, float] = field(default_factory=dict)
    pooling: PoolingInfo | None = None
    source: str = ""
    source_format: str = ""

    @property
    def weights_are(self) -> str:
        """What is served, from where and in what bits, in words."""
        stored, served = self.source_format, self.dtype
        cast = "" if stored.endswith(f" {served}") else f", served as {served}"
        return f"{stored}{cast}, from {self.source}" if self.source else served
