"""What all tasks have in common: what a step tells of a request, and the seams of schedulers and runners. No torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar

import msgspec

from shuteye.errors import ErrorInfo
from shuteye.models.binding import BoundModel
from shuteye.state import Epoch, SchedulerStats
from shuteye.tasks.generate.requests import (
    FinishReason,
    RequestOutput,
    TokenLogprobs,
)
from shuteye.tasks.pool.requests import PooledDelta, PooledOutput
from shuteye.tasks.transcribe.requests import TranscriptDelta, Transcription


@dataclass(frozen=True, slots=True)
class Deltas:
    """What is to be known of outputs that each say only what is new.

    Attributes:
        join: makes one of several that follow each other.
        weigh: how many tokens and log-probabilities one holds.
    """

    join: Callable[[Sequence[Any]], Any]
    weigh: Callable[[Any], int]


OutputT_co = TypeVar("OutputT_co", covariant=True)


class Job(Generic[OutputT_co]):
    """What a caller asks of a model: one prompt, some texts, one piece of audio. It comes to outputs of one type."""

    __slots__ = ()

    @property
    def deltas(self) -> Deltas | None:
        """How outputs are joined that each say only what is new; None if each says all that those before it said."""
        return None


@dataclass(frozen=True, slots=True)
class Processed:
    """What came of some deltas.

    Attributes:
        outputs: to deliver, at most one per request.
        aborts: engine-side ids that need not go on: a stop string ended them, or a sibling failed.
        errors: requests that failed; nothing more comes for them.
    """

    outputs: tuple[RequestOutput | PooledOutput | Transcription, ...] = ()
    aborts: tuple[str, ...] = ()
    errors: tuple[tuple[str, ErrorInfo], ...] = ()


if TYPE_CHECKING:
    import torch

    from shuteye.memory.arena import Arena
    from shuteye.tasks.canary import Prove
    from shuteye.tasks.table import Request, Result

JobT = TypeVar("JobT", bound=Job[Any])


class TaskOutputs(ABC, Generic[JobT]):
    """Follows the jobs of one kind: makes engine-side requests of them, and outputs of what the engine did."""

    def prepare(self, job: JobT) -> JobT:
        """The job, validated against the model and tokenized.

        Raises:
            InvalidRequest: it cannot be served.
        """
        return job

    @abstractmethod
    def add(self, request_id: str, job: JobT, *, engine_id: str) -> Sequence[Request]:
        """Follow a prepared job; what to submit to the engine.

        Args:
            engine_id: its name in the engine, never used before: so nothing that is still on its way for an earlier
                request of the same id is taken for this one's.
        """

    @abstractmethod
    def process(self, deltas: Iterable[Any]) -> Processed:
        """Take what the engine did; deltas of requests that are not followed (any more) are ignored."""

    @abstractmethod
    def abort(self, request_id: str) -> list[str]:
        """Stop following a request, if it is known; the engine-side ids to abort."""

    @abstractmethod
    def engine_ids(self, request_id: str) -> tuple[str, ...]:
        """The engine-side ids of a request that are unfinished; none if it is not known."""

    def note_started(self, started: Iterable[tuple[str, float]]) -> None:
        """When requests, by their engine-side ids, began to be computed (monotonic seconds)."""


class TaskScheduler(Protocol):
    """Requests of one kind on their way through steps.

    Use is strictly `schedule`, then `update` or `fail_step` with that plan. In between, `abort` and `preempt_all` are
    allowed: what the step yields for those requests is then ignored. Plans, results and requests are of one kind each.
    """

    @property
    def has_unfinished(self) -> bool:
        """True while there is a request, running or waiting."""
        ...

    @property
    def num_running(self) -> int:
        """Requests that hold memory, or have results already."""
        ...

    @property
    def num_waiting(self) -> int:
        """Requests that hold nothing."""
        ...

    def add(self, request: Any) -> None:
        """Queue a request; raises as `check` does."""
        ...

    def check(self, request: Any) -> None:
        """Refuse what can never run, changing nothing.

        Raises:
            InvalidRequest: says why.
        """
        ...

    def abort(self, request_ids: Iterable[str]) -> list[RequestDelta]:
        """End requests with reason "abort" and free what they hold; unknown ids are ignored."""
        ...

    def abort_all(self) -> list[RequestDelta]:
        """End every request."""
        ...

    def preempt_all(self) -> int:
        """Undo what was computed for requests, which stay and are computed again; how many that were."""
        ...

    def reset_prefix_cache(self) -> None:
        """Forget what other requests could have shared."""
        ...

    def enter_epoch(self, epoch: Epoch) -> None:
        """What memory holds: if it is not what it was, nothing computed so far is used; later plans carry `epoch`."""
        ...

    def schedule(self) -> Any:
        """The next step's plan, or None if there is no request at all."""
        ...

    def update(self, plan: Any, result: Any) -> Sequence[Delta]:
        """Take the step's outcome."""
        ...

    def fail_step(self, plan: Any, error: ErrorInfo) -> Sequence[Delta]:
        """The step was not computed: end its requests with `error`."""
        ...

    def stats(self) -> SchedulerStats:
        """Gauges and counters."""
        ...


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


Delta = RequestDelta | PooledDelta | TranscriptDelta
"""What a step may have done for a request, by the kind of request."""


OutputKind = Literal["cumulative", "delta", "final_only"]
"""Whether each yielded output repeats everything so far, only what is new, or comes once at the end."""


class ModelRunner(Protocol):
    """One task's steps. Made while the weights are resident; used only while every tag is."""

    @property
    def model(self) -> BoundModel[Any]:
        """The bound model."""
        ...

    @property
    def kv_bytes_per_token(self) -> int:
        """KV cache bytes of one token; 0 if the engine keeps no KV cache for this task."""
        ...

    def attach_kv_cache(self, arena: Arena, *, num_blocks: int) -> None:
        """Look into the committed KV arena, of no bytes where `kv_bytes_per_token` is 0; called once, before steps."""
        ...

    def execute(self, plan: Any, *, prove: Prove | None = None) -> Result:
        """Run one step of this task's kind of plan; with `prove`, the canary too, before anything comes of the step."""
        ...

    def drop_computed(self) -> None:
        """Memory is about to be released: let go of what was computed for requests, who will begin anew."""
        ...

    def canary_pass(self) -> torch.Tensor:
        """The numbers (any shape) that a short fixed input gives; they depend on nothing but weights and buffers."""
        ...
