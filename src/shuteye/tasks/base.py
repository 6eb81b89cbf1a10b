"""What all tasks have in common: what a step tells of a request, and what every scheduler and runner is. No torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import msgspec

from shuteye.errors import ErrorInfo, InvalidRequest
from shuteye.state import Epoch, SchedulerStats
from shuteye.tasks.generate.requests import (
    FinishReason,
    RequestOutput,
    TokenLogprobs,
)
from shuteye.tasks.pool.requests import PooledDelta, PooledOutput
from shuteye.tasks.transcribe.requests import TranscriptDelta, Transcription

if TYPE_CHECKING:
    import numpy as np

    from shuteye.memory.arena import Arena
    from shuteye.models.binding import BoundModel
    from shuteye.tasks.canary import Prove
    from shuteye.tasks.table import Request, Result


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


@dataclass(slots=True, eq=False)
class ActiveRequest:
    """A request on its way; each task adds how far it is."""

    request: Any

    @property
    def request_id(self) -> str:
        """Its name in the engine."""
        return str(self.request.request_id)


def id_in_use(request_id: str) -> InvalidRequest:
    """The refusal of a request whose id another one has."""
    return InvalidRequest(
        f"Request id {request_id!r} is in use; wait for it to end or choose another.", param="request_id"
    )


class TaskScheduler(ABC):
    """Requests of one kind on their way through steps.

    Use is strictly `schedule`, then `update`, `fail_step` or `drop_step` with that plan; where several plans may be in
    flight, in the order in which they were scheduled. In between, `abort` and `preempt_all` are allowed: what the step
    yields for those requests is then ignored. Plans, results and requests are of one kind each.

    A scheduler keeps every request in `_requests`, in order of arrival, and takes it out with `_remove` alone.
    """

    _requests: dict[str, Any]  # each an `ActiveRequest`

    def __init__(self) -> None:
        self._requests = {}
        # Plans, oldest first, and their parts, each with a `request_id`.
        self._in_flight: deque[tuple[Any, tuple[Any, ...]]] = deque()
        self._epoch: Epoch = ()
        self._num_prompt_tokens = 0
        self._num_generation_tokens = 0
        self._num_preemptions = 0

    # --- requests in and out ---------------------------------------------------------------------

    def check(self, request: Any) -> None:
        """Refuse what can never run, changing nothing.

        Raises:
            InvalidRequest: says why.
        """
        if request.request_id in self._requests:
            raise id_in_use(request.request_id)

    @abstractmethod
    def add(self, request: Any) -> None:
        """Queue a request; raises as `check` does."""

    def abort(self, request_ids: Iterable[str]) -> list[RequestDelta]:
        """End requests with reason "abort" and free what they hold; unknown ids are ignored."""
        return self._end(request_ids, reason="abort")

    def abort_all(self) -> list[RequestDelta]:
        """End every request, in order of arrival."""
        return self.abort(tuple(self._requests))

    def _end(
        self, request_ids: Iterable[str], *, reason: FinishReason | None = None, error: ErrorInfo | None = None
    ) -> list[RequestDelta]:
        found = [request_id for request_id in dict.fromkeys(request_ids) if request_id in self._requests]
        for request_id in found:
            self._remove(self._requests[request_id])
        return [RequestDelta(request_id, finish_reason=reason, error=error) for request_id in found]

    def _remove(self, active: Any) -> None:
        """Forget a request and free what it holds."""
        del self._requests[active.request_id]

    @abstractmethod
    def preempt_all(self) -> int:
        """Undo what was computed for requests, which stay and are computed again; how many that were."""

    def reset_prefix_cache(self) -> None:  # noqa: B027 (for most tasks there is nothing to do)
        """Forget what other requests could have shared."""

    def enter_epoch(self, epoch: Epoch) -> None:
        """What memory holds: if it is not what it was, nothing computed so far is used; later plans carry `epoch`."""
        if epoch != self._epoch:
            self._epoch = epoch
            self.preempt_all()

    def readmit_all(self) -> None:
        """What computes was started again, and has forgotten every request: they are all computed again."""
        self.preempt_all()

    # --- a step ----------------------------------------------------------------------------------

    @abstractmethod
    def schedule(self) -> Any:
        """The next step's plan; None if there is no request at all, or what there is waits for plans in flight."""

    @abstractmethod
    def update(self, plan: Any, result: Any) -> Sequence[Delta]:
        """Take the step's outcome."""

    def fail_step(self, plan: Any, error: ErrorInfo) -> list[RequestDelta]:
        """The step was not computed: end its requests with `error`."""
        return self._end((part.request_id for part in self._land(plan)), error=error)

    def drop_step(self, plan: Any) -> None:
        """The step was not computed, and its requests are to be computed again, once that is possible."""
        self._land(plan)
        self.preempt_all()

    def _land(self, plan: Any) -> tuple[Any, ...]:
        """Take the parts of the oldest plan in flight, which this must be."""
        assert self._in_flight, "the outcome of a plan that is not in flight"
        in_flight, parts = self._in_flight.popleft()
        assert plan is in_flight, "the outcome of a plan that is not the oldest in flight"
        return parts

    # --- what can be seen ------------------------------------------------------------------------

    @property
    def has_unfinished(self) -> bool:
        """True while there is a request, running or waiting."""
        return bool(self._requests)

    @property
    @abstractmethod
    def num_running(self) -> int:
        """Requests that hold memory, or have results already."""

    @property
    def num_waiting(self) -> int:
        """Requests that hold nothing: new or preempted."""
        return len(self._requests) - self.num_running

    def stats(self) -> SchedulerStats:
        """Gauges and counters; those of blocks are 0 where there are none."""
        return SchedulerStats(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            num_prompt_tokens_total=self._num_prompt_tokens,
            num_generation_tokens_total=self._num_generation_tokens,
            num_preemptions_total=self._num_preemptions,
        )


class ModelRunner(ABC):
    """One task's steps. Made while the weights are resident; used only while every tag is.

    Attributes:
        model: the bound model.
        kv_bytes_per_token: KV cache bytes of one token; 0 if the engine keeps no KV cache for this task.
        kv_cache_dtype: what it holds; empty if there is none.
    """

    model: BoundModel[Any]
    kv_bytes_per_token: int = 0
    kv_cache_dtype: str = ""

    def attach_kv_cache(self, arena: Arena, *, num_blocks: int) -> None:
        """Look into the committed KV arena, of no bytes where `kv_bytes_per_token` is 0; called once, before steps."""
        assert arena.nbytes == num_blocks == 0, "a KV cache for a task that has none"

    @abstractmethod
    def execute(self, plan: Any, *, prove: Prove | None = None) -> Result:
        """Run one step of this task's kind of plan; with `prove`, the canary too, before anything comes of the step."""

    def drop_computed(self) -> None:  # noqa: B027 (for most tasks there is nothing to do)
        """Memory is about to be released: let go of what was computed for requests and lies outside of the arenas."""

    @abstractmethod
    def canary_pass(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The float32 numbers (any shape) that a short fixed input gives, by nothing but weights and buffers."""
