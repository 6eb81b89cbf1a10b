"""One step of a model that generates, and its result, as frozen data. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from shuteye.state import Epoch
from shuteye.tasks.generate.requests import SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Admission:
    """A request the worker has not seen: what the sampler must know for all of its steps.

    Attributes:
        output_token_ids: sampled before, by a worker that is gone.
    """

    request_id: str
    params: SamplingParams
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...] = ()


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
    def starts(self) -> tuple[str, ...]:
        """The requests that get their place in the batch with this step."""
        return tuple(admission.request_id for admission in self.admissions)

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
