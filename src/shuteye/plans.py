"""What is to be done, as frozen data: one step of the model, one sleep, one wake.

The scheduler and the sleep controller make plans; workers carry them out. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shuteye.outputs import TokenLogprobs
from shuteye.request import SamplingParams

VerifyMode = Literal["off", "sample", "full"]

SCRATCH_BLOCK = 0
RESERVED_BLOCKS = 1
"""KV block 0 is the canary's scratch block: it exists in the cache but is never handed out to a request."""

# --- a step -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Admission:
    """A request the worker has not seen: what the sampler must know for all of its steps."""

    request_id: str
    params: SamplingParams
    prompt_token_ids: tuple[int, ...]


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


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass over a packed batch. `forget` names requests whose sampling state can go."""

    chunks: tuple[Chunk, ...]
    admissions: tuple[Admission, ...] = ()
    forget: tuple[str, ...] = ()

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
    """Sampled tokens, in the order of the plan's sampling chunks."""

    sampled: tuple[SampledToken, ...]


# --- the model ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a worker learnt by loading the model, from which the engine sizes everything else.

    Attributes:
        context_length: positions the checkpoint was made for.
        kv_bytes_per_token: KV cache bytes of one token on this rank, all layers.
        available_bytes: memory the system could still give after loading.
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
    """What a plan would need, found before anything is touched."""

    save_bytes: int
    free_backing_bytes: int


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
