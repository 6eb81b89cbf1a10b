"""A scheduler for requests some of which have a grammar: they join once it is compiled, and carry masks in every step.

Knows nothing of how grammars or steps are made; requests without one pass straight through. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from shuteye.errors import ErrorInfo, ShuteyeError, info_of
from shuteye.state import Epoch, SchedulerStats
from shuteye.tasks.base import RequestDelta
from shuteye.tasks.generate.grammar import Grammars
from shuteye.tasks.generate.plans import StepPlan, StepResult
from shuteye.tasks.generate.requests import GenerateRequest
from shuteye.tasks.generate.scheduler import Scheduler

PATIENCE_S = 0.005
"""How long a step waits for a grammar when nothing else could run."""


class ConstrainedScheduler:
    """See `TaskScheduler`. A request whose grammar is being compiled counts as waiting.

    Args:
        inner: schedules everything that is ready to run.
        report: takes the refusal of a request whose grammar turned out wrong.
    """

    def __init__(self, inner: Scheduler, grammars: Grammars, *, report: Callable[[RequestDelta], None]) -> None:
        self._inner = inner
        self._grammars = grammars
        self._report = report
        self._in_flight: StepPlan | None = None  # the inner scheduler's own plan, without masks

    @property
    def has_unfinished(self) -> bool:
        """True while there is a request: running, waiting, or being compiled."""
        return self._inner.has_unfinished or self._grammars.num_compiling > 0

    @property
    def num_running(self) -> int:
        """Requests that own blocks."""
        return self._inner.num_running

    @property
    def num_waiting(self) -> int:
        """Requests that own none."""
        return self._inner.num_waiting + self._grammars.num_compiling

    def stats(self) -> SchedulerStats:
        """Gauges and counters."""
        return replace(self._inner.stats(), num_waiting=self.num_waiting)

    # --- requests in and out ---------------------------------------------------------------------

    def check(self, request: GenerateRequest) -> None:
        """Refuse what can never run; a wrong grammar is found later."""
        self._inner.check(request)
        self._grammars.check(request)

    def add(self, request: GenerateRequest) -> None:
        """Queue a request, or begin to compile its grammar."""
        if request.params.structured_outputs is None:
            self._inner.add(request)
        else:
            self.check(request)
            self._grammars.compile(request)

    def abort(self, request_ids: Iterable[str]) -> list[RequestDelta]:
        """End requests with reason "abort", wherever they are; ids not known are ignored."""
        request_ids = tuple(request_ids)
        return self._grammars.abort(request_ids) + self._forgetting(self._inner.abort(request_ids))

    def abort_all(self) -> list[RequestDelta]:
        """Abort every request."""
        return self._grammars.abort_all() + self._forgetting(self._inner.abort_all())

    def preempt_all(self) -> int:
        """Send every running request back to the queue; its grammar stays where it is, as its tokens do."""
        return self._inner.preempt_all()

    def reset_prefix_cache(self) -> None:
        """Forget what other requests could have shared: blocks, and compiled grammars if none is in use."""
        self._inner.reset_prefix_cache()
        self._grammars.rest()

    def enter_epoch(self, epoch: Epoch) -> None:
        """Preempt every running request if memory holds something else now; grammars and tokens stay."""
        self._inner.enter_epoch(epoch)

    def _forgetting(self, deltas: list[RequestDelta]) -> list[RequestDelta]:
        if not self._grammars.is_idle:
            self._grammars.forget(delta.request_id for delta in deltas if delta.finished)
        return deltas

    # --- a step ----------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """The next step, or None if nothing can run yet."""
        if self._grammars.num_compiling > 0:
            self._admit_compiled(patience_s=0.0 if self._inner.has_unfinished else PATIENCE_S)
        plan = self._in_flight = self._inner.schedule()
        return None if plan is None else self._grammars.masked(plan)

    def _admit_compiled(self, *, patience_s: float) -> None:
        for request, refusal in self._grammars.compiled(patience_s=patience_s):
            try:
                if refusal is not None:
                    raise refusal
                self._inner.add(request)
            except ShuteyeError as error:
                self._grammars.forget([request.request_id])
                self._report(RequestDelta(request.request_id, error=info_of(error)))

    def update(self, _plan: StepPlan, result: StepResult) -> Sequence[RequestDelta]:
        """Take the step's tokens; a request whose grammar failed ends with an error."""
        assert self._in_flight is not None, "the outcome of a plan that is not in flight"
        deltas = self._inner.update(self._in_flight, result)
        if self._grammars.is_idle:
            return deltas
        followed = self._grammars.follow(deltas)
        self._inner.abort(delta.request_id for delta in followed if delta.error is not None)
        return self._forgetting(followed)

    def fail_step(self, _plan: StepPlan, error: ErrorInfo) -> Sequence[RequestDelta]:
        """The step was not computed: end its requests with `error`."""
        assert self._in_flight is not None, "the outcome of a plan that is not in flight"
        return self._forgetting(self._inner.fail_step(self._in_flight, error))
