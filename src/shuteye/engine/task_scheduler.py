"""What the engine core asks of whoever decides the next step, and which scheduler serves a model's task.

Knows nothing of how any of them decides. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from shuteye.config import EngineConfig
from shuteye.engine.constrained_scheduler import ConstrainedScheduler
from shuteye.engine.grammar import Grammars
from shuteye.engine.pool_scheduler import PoolScheduler
from shuteye.engine.scheduler import Scheduler
from shuteye.engine.speech_scheduler import SpeechScheduler
from shuteye.errors import InvalidRequest
from shuteye.outputs import Delta, ErrorInfo, RequestDelta, SchedulerStats
from shuteye.plans import Epoch, ModelFacts, Plan, PoolPlan, StepPlan
from shuteye.request import GenerateRequest, PoolRequest, Request, TranscribeRequest


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


REQUEST_KINDS: dict[str, type[Request]] = {
    "generate": GenerateRequest,
    "embed": PoolRequest,
    "score": PoolRequest,
    "transcribe": TranscribeRequest,
}
"""Task → what its scheduler takes."""


def require_kind(task: str, request: Request) -> None:
    """Refuse a request that is not for the model's task.

    Raises:
        InvalidRequest: names task and kind.
    """
    if not isinstance(request, REQUEST_KINDS[task]):
        raise InvalidRequest(f"The model is one for the task '{task}'; it cannot serve a {type(request).__name__}.")


def starts_of(plan: Plan) -> tuple[str, ...]:
    """The requests that get their place in a batch with this step, as far as its kind of plan tells."""
    if isinstance(plan, StepPlan):
        return tuple(admission.request_id for admission in plan.admissions)
    return plan.starts if isinstance(plan, PoolPlan) else ()


def open_scheduler(
    config: EngineConfig, facts: ModelFacts, *, num_blocks: int, report: Callable[[RequestDelta], None]
) -> TaskScheduler:
    """The scheduler for the task of the loaded model; `config` is complete.

    Args:
        report: takes the refusal of a request that had been let in, whenever that is found.
    """
    assert config.max_model_len is not None
    if REQUEST_KINDS[facts.task] is PoolRequest:
        return PoolScheduler(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=config.max_model_len,
            pooling=facts.pooling,
        )
    if REQUEST_KINDS[facts.task] is TranscribeRequest:
        return SpeechScheduler(
            facts=facts.speech, max_num_seqs=config.max_num_seqs, available_bytes=facts.available_bytes
        )
    scheduler = Scheduler(
        num_blocks=num_blocks,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=config.max_model_len,
        eos_token_ids=facts.eos_token_ids,
        enable_prefix_caching=config.enable_prefix_caching,
    )
    grammars = Grammars(
        tokenizer_dir=facts.tokenizer_dir,
        vocab_size=facts.vocab_size,
        eos_token_ids=facts.eos_token_ids,
        max_bytes=config.max_grammar_bytes,
        timeout_s=config.grammar_timeout_s,
    )
    return ConstrainedScheduler(scheduler, grammars, report=report)
