"""A scheduler for requests some of which have a grammar: they join once it is compiled, and carry masks in every step.

Requests without one are scheduled as if it were not there. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from shuteye.errors import ErrorInfo, ShuteyeError, info_of
from shuteye.tasks.base import RequestDelta
from shuteye.tasks.generate.grammar import Grammars
from shuteye.tasks.generate.plans import StepPlan, StepResult
from shuteye.tasks.generate.requests import GenerateRequest
from shuteye.tasks.generate.scheduler import Limits, Scheduler

GRAMMAR_WAIT_S = 0.005
"""How long a step waits for a grammar when nothing else could run."""


class ConstrainedScheduler(Scheduler):
    """A `Scheduler` that knows grammars. A request whose grammar is being compiled counts as waiting.

    Args:
        report: takes the refusals of requests whose grammar turned out wrong.
    """

    def __init__(
        self,
        limits: Limits,
        grammars: Grammars,
        *,
        eos_token_ids: Collection[int],
        enable_prefix_caching: bool,
        report: Callable[[Iterable[RequestDelta]], None],
    ) -> None:
        super().__init__(limits, eos_token_ids=eos_token_ids, enable_prefix_caching=enable_prefix_caching)
        self._grammars = grammars
        self._report = report

    @property
    def has_unfinished(self) -> bool:
        """True while there is a request: running, waiting, or being compiled."""
        return super().has_unfinished or self._grammars.num_compiling > 0

    @property
    def num_waiting(self) -> int:
        """Requests that own no blocks."""
        return super().num_waiting + self._grammars.num_compiling

    # --- requests in and out ---------------------------------------------------------------------

    def check(self, request: GenerateRequest) -> None:
        """Refuse what can never run; a wrong grammar is found later."""
        super().check(request)
        self._grammars.check(request)

    def add(self, request: GenerateRequest) -> None:
        """Queue a request, or begin to compile its grammar."""
        if request.params.structured_outputs is None:
            super().add(request)
        else:
            self.check(request)
            self._grammars.compile(request)

    def abort(self, request_ids: Iterable[str]) -> list[RequestDelta]:
        """End requests with reason "abort", wherever they are; ids not known are ignored."""
        request_ids = tuple(request_ids)
        return self._grammars.abort(request_ids) + self._forgetting(super().abort(request_ids))

    def abort_all(self) -> list[RequestDelta]:
        """Abort every request."""
        return self._grammars.abort_all() + super().abort_all()

    def reset_prefix_cache(self) -> None:
        """Forget what other requests could have shared: blocks, and compiled grammars if none is in use."""
        super().reset_prefix_cache()
        self._grammars.rest()

    def _forgetting(self, deltas: list[RequestDelta]) -> list[RequestDelta]:
        if not self._grammars.is_idle:
            self._grammars.forget(delta.request_id for delta in deltas if delta.finished)
        return deltas

    # --- a step ----------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """The next step, or None if nothing can run yet."""
        if self._grammars.num_compiling > 0:
            self._admit_compiled(wait_s=0.0 if super().has_unfinished else GRAMMAR_WAIT_S)
        return super().schedule()

    def _complete(self, plan: StepPlan) -> StepPlan:
        return self._grammars.masked(plan)

    def _admit_compiled(self, *, wait_s: float) -> None:
        for request, refusal in self._grammars.compiled(wait_s=wait_s):
            try:
                if refusal is not None:
                    raise refusal
                super().add(request)
            except ShuteyeError as error:
                self._grammars.forget([request.request_id])
                self._report([RequestDelta(request.request_id, error=info_of(error))])

    def update(self, plan: StepPlan, result: StepResult) -> list[RequestDelta]:
        """Take the step's tokens; a request whose grammar failed ends with an error."""
        deltas = super().update(plan, result)
        if self._grammars.is_idle:
            return deltas
        followed = self._grammars.follow(deltas)
        super().abort(delta.request_id for delta in followed if delta.error is not None)
        return self._forgetting(followed)

    def fail_step(self, plan: StepPlan, error: ErrorInfo) -> list[RequestDelta]:
        """The step was not computed: end its requests with `error`."""
        return self._forgetting(super().fail_step(plan, error))
