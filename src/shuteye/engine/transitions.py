"""Control calls: each a transition of many steps, between which the model may run; one after the other.

Knows nothing of how requests enter or run. A call's steps are a generator (ADR 5): each `yield` waits for requests to
drain, the return value is the call's report.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, assert_never, get_args

from shuteye.calls import (
    Call,
    ControlCall,
    PauseCall,
    ReloadCall,
    ResetPrefixCacheCall,
    ResumeCall,
    RpcCall,
    SleepCall,
    UpdateCall,
    UpdateFromFileCall,
    WakeCall,
)
from shuteye.config import EngineConfig
from shuteye.engine.controller import SleepController
from shuteye.engine.held import HeldRequests
from shuteye.errors import (
    DrainTimeout,
    EngineFaulted,
    InvalidRequest,
    ShuteyeError,
    SleepModeDisabled,
    TransitionConflict,
)
from shuteye.executors import Executor
from shuteye.state import (
    TAGS,
    DrainMode,
    SleepPlan,
    SleepReport,
    Tag,
    UpdateReport,
    VerifyMode,
    WakeReport,
    sum_updates,
)
from shuteye.tasks.base import Delta, TaskScheduler

SCHEDULING = "scheduling"
"""A tag of `wake_up` that names no memory: it lifts a sleep at level 0, as in vLLM."""

Report = SleepReport | WakeReport | UpdateReport | list[Any] | None
Steps = Generator[None, None, Report]
"""A transition under way: each `next` is one look whether it can go on; the return value is its report."""


class WakeForRequests(Call[WakeReport], frozen=True):
    """A wake of all tags that nobody asked for but the policy: the canary goes with the first step of the requests."""

    verb: ClassVar[str] = "wake_up"


@dataclass(slots=True)
class Transition:
    """A control call on its way: waiting, under way (`steps`), or answered through `answer`."""

    call: ControlCall | WakeForRequests
    answer: Callable[[Report | ShuteyeError], None]
    steps: Steps | None = None


class Transitions:
    """The queue of control calls, the oldest of which is under way.

    Args:
        config: complete.
        report: takes what a transition did to requests.

    Attributes:
        closing_for_sleep: requests that arrive now will find the model asleep.
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        sleep: SleepController,
        *,
        scheduler: TaskScheduler,
        held: HeldRequests,
        report: Callable[[Iterable[Delta]], None],
    ) -> None:
        self.closing_for_sleep = False
        self._config = config
        self._executor = executor
        self._sleep = sleep
        self._scheduler = scheduler
        self._held = held
        self._report = report
        self._queue: deque[Transition] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def under_way(self) -> str | None:
        """The verb of the oldest call."""
        return self._queue[0].call.verb if self._queue else None

    def submit(self, call: ControlCall | WakeForRequests, answer: Callable[[Report | ShuteyeError], None]) -> None:
        """Queue a call; `answer` is called exactly once, during some later `advance`."""
        self._queue.append(Transition(call, answer))

    def advance(self, *, before_each: Callable[[], None]) -> None:
        """Take the oldest call as far as it goes, and those after it, unless it waits for requests to drain.

        Args:
            before_each: lets requests in that the call before let in; they run, or are drained by the next one.
        """
        while self._queue:
            before_each()
            transition = self._queue[0]
            outcome: Report | ShuteyeError
            try:
                if transition.steps is None:
                    transition.steps = self._start(transition.call)
                next(transition.steps)
            except StopIteration as stop:
                outcome = stop.value
            except ShuteyeError as error:
                outcome = error
            else:
                return  # still draining
            self._queue.popleft()
            transition.answer(outcome)

    def _start(self, call: ControlCall | WakeForRequests) -> Steps:
        state = self._sleep.state
        wakes = isinstance(call, WakeCall | WakeForRequests)
        recovers = wakes and (state.is_sleeping or state.faulted)  # from a reload that failed
        if (wakes or isinstance(call, SleepCall)) and not self._config.enable_sleep_mode and not recovers:
            raise SleepModeDisabled("Sleep mode is off; start the engine with enable_sleep_mode (--enable-sleep-mode).")
        match call:
            case SleepCall():
                steps = self._sleep_steps(call)
            case WakeCall():
                steps = self._wake_steps(call)
            case WakeForRequests():
                steps = self._wake_for_requests_steps()
            case PauseCall():
                steps = self._pause_steps(call)
            case ResumeCall():
                steps = self._resume_steps()
            case UpdateFromFileCall() | UpdateCall() | ReloadCall():
                steps = self._update_steps(call)
            case ResetPrefixCacheCall():
                steps = self._reset_prefix_cache_steps()
            case RpcCall():
                steps = self._rpc_steps(call)
            case _:
                assert_never(call)
        return steps

    def _sleep_steps(self, call: SleepCall) -> Steps:
        begin = time.perf_counter()
        level, tags = parse_level(call.level), parse_tags(call.tags)
        mode = parse_mode(call.mode, self._config.default_sleep_mode)
        if level == 0:
            return (yield from self._doze_steps(call, mode, begin))
        plan = self._sleep.plan_sleep(level, tags)
        if plan == SleepPlan():
            return self._at_rest(begin, *self._empty_batch(mode))
        self._sleep.check_room(plan)
        self.closing_for_sleep = True
        try:
            yield from self._drain(mode, call.timeout_s)
            self._sleep.save(plan)  # before requests are ended: if it fails, they go on
            ended, held = self._empty_batch(mode)
            self._scheduler.reset_prefix_cache()  # the release is another epoch; this gives compiled grammars back, too
            report = self._sleep.release(plan, begin=begin)
        finally:
            self.closing_for_sleep = False
            self._sleep.set_gate(draining=False)
        self._held.bound(time.monotonic() + self._config.hold_timeout_s)
        return replace(report, aborted_requests=ended, held_requests=held)

    def _doze_steps(self, call: SleepCall, mode: DrainMode, begin: float) -> Steps:
        """Level 0: a pause that wake_up lifts."""
        self._sleep.refuse_if_faulted()
        state = self._sleep.state
        if state.is_sleeping:
            raise TransitionConflict(f"Cannot sleep at level 0: asleep at level {state.level}, which is deeper.")
        ended, held = yield from self._closed_by_pause(mode, call.timeout_s)
        self._sleep.set_gate(paused_by_sleep=True)
        return replace(self._at_rest(begin, ended, held), changed=not state.paused_by_sleep)

    def _at_rest(self, begin: float, ended: int, held: int) -> SleepReport:
        """The report of a sleep that moved no memory, but may have aborted requests that were held."""
        level = self._sleep.state.level
        assert level is not None
        return SleepReport(
            changed=False,
            level=level,
            residual_bytes=sum(self._sleep.residual_bytes()),
            seconds=time.perf_counter() - begin,
            aborted_requests=ended,
            held_requests=held,
        )

    def _wake_steps(self, call: WakeCall) -> Steps:
        yield from ()
        tags = call.tags
        if tags is not None and SCHEDULING in tags:
            tags = [tag for tag in tags if tag != SCHEDULING]
            if not tags:
                return self._resume_scheduling()
        return self._wake(parse_tags(tags), defer_canary=False)

    def _resume_scheduling(self) -> WakeReport:
        """Undo level 0, and nothing else: a model that has given memory back schedules once that is back."""
        begin = time.perf_counter()
        self._sleep.refuse_if_faulted()
        paused = self._sleep.state.paused_by_sleep
        self._sleep.set_gate(paused_by_sleep=False)
        return WakeReport(changed=paused, seconds=time.perf_counter() - begin)

    def _wake_for_requests_steps(self) -> Steps:
        yield from ()
        return self._wake(TAGS, defer_canary=True)

    def _wake(self, tags: tuple[Tag, ...], *, defer_canary: bool) -> WakeReport:
        report = self._sleep.wake(tags, defer_canary=defer_canary)
        if not self._sleep.state.is_sleeping:
            self._held.unbound()
        return report

    def _pause_steps(self, call: PauseCall) -> Steps:
        mode = parse_mode(call.mode, self._config.default_sleep_mode)
        before = self._sleep.state.refusing
        self._sleep.set_gate(refusing=mode != "keep")  # from now on: a drain would never end otherwise
        try:
            yield from self._closed_by_pause(mode, call.timeout_s)
        except ShuteyeError:
            self._sleep.set_gate(refusing=before)
            raise
        self._sleep.set_gate(paused=True)
        return None

    def _resume_steps(self) -> Steps:
        yield from ()
        state = self._sleep.state
        self._sleep.refuse_if_faulted()
        if state.is_sleeping:
            raise TransitionConflict("Cannot resume while asleep; wake up first with a POST request to /wake_up.")
        self._sleep.set_gate(paused=False, refusing=False, paused_by_sleep=False)
        return None

    def _update_steps(self, call: UpdateFromFileCall | UpdateCall | ReloadCall) -> Steps:
        """Between two steps of the model. What was written is another epoch, so requests in flight are recomputed."""
        yield from ()
        return sum_updates(self._write(call))

    def _write(self, call: UpdateFromFileCall | UpdateCall | ReloadCall) -> list[UpdateReport]:
        """What each rank has written."""
        state = self._sleep.state
        self._sleep.refuse_if_faulted()
        if state.residency("weights") not in ("resident", "blank"):
            raise TransitionConflict(
                f"Weights can only be written while they are mapped, and they are {state.residency('weights')}; "
                'wake them first: wake_up(tags=["weights"]).'
            )
        try:
            match call:
                case ReloadCall(path):
                    reports: list[UpdateReport] = self._executor.call("reload_weights", path)
                case UpdateFromFileCall(path):
                    reports = self._executor.call("update_weights_from_file", path)
                case UpdateCall(named_tensors):
                    reports = self._executor.call("update_weights", named_tensors)
        except EngineFaulted as error:
            raise self._sleep.fault(error.message) from error
        finally:  # also after an update that broke off: what it had written is there
            self._sleep.refresh()
            if not self._sleep.state.faulted:
                self._sleep.check_after_update(reloaded=isinstance(call, ReloadCall))
        return reports

    def _reset_prefix_cache_steps(self) -> Steps:
        yield from ()
        self._scheduler.reset_prefix_cache()
        return None

    def _rpc_steps(self, call: RpcCall) -> Steps:
        yield from ()
        check_rpc(call.method, call.args)
        if call.method == ReloadCall.verb:
            return self._write(ReloadCall(*call.args))
        return self._executor.call(call.method, *call.args)

    # --- draining -------------------------------------------------------------------------------

    def _closed_by_pause(self, mode: DrainMode, timeout_s: float | None) -> Generator[None, None, tuple[int, int]]:
        try:
            yield from self._drain(mode, timeout_s)
            return self._empty_batch(mode)
        finally:
            self._sleep.set_gate(draining=False)

    def _drain(self, mode: DrainMode, timeout_s: float | None) -> Generator[None, None, None]:
        """Let requests in flight finish, if `mode` says so.

        While the gate is closed already, nothing runs: what is in the scheduler is held, not waited for.
        """
        allowed_s = parse_timeout(timeout_s, self._config.drain_timeout_s)
        self._sleep.set_gate(draining=True)
        if mode != "wait" or self._sleep.state.gate == "closed":
            return
        deadline = time.monotonic() + allowed_s
        while self._scheduler.has_unfinished:
            self._sleep.refuse_if_faulted()  # they wait for a wake, which would wait for this
            if time.monotonic() > deadline:
                unfinished = self._scheduler.num_running + self._scheduler.num_waiting
                raise DrainTimeout(
                    f"Drain timed out with {unfinished} requests still running; they go on, and the model stays awake. "
                    "Use mode=abort or mode=keep, or a longer timeout."
                )
            yield

    def _empty_batch(self, mode: DrainMode) -> tuple[int, int]:
        """Take every request out of the batch as `mode` says: how many were aborted, and how many are held."""
        if mode == "abort":
            ended = self._scheduler.abort_all() + self._held.abort_all()
            self._report(ended)
            return len(ended), 0
        self._scheduler.preempt_all()
        return 0, self._scheduler.num_waiting + len(self._held)


# --- what callers gave ------------------------------------------------------------------------


def parse_level(level: int) -> int:
    """A level of the table: 0, 1 or 2."""
    if isinstance(level, bool) or level not in (0, 1, 2):
        raise InvalidRequest(f"level must be 0, 1 or 2, got {level!r}.", param="level")
    return level


def parse_tags(tags: Sequence[str] | None) -> tuple[Tag, ...]:
    """Known tags, in the order of `TAGS`; None means all of them."""
    if tags is None:
        return TAGS
    unknown = [tag for tag in tags if tag not in TAGS]
    if unknown or not tags or isinstance(tags, str):
        raise InvalidRequest(f"tags must be a non-empty list out of {list(TAGS)}, got {tags!r}.", param="tags")
    return tuple(tag for tag in TAGS if tag in tags)


def parse_mode(mode: str | None, default: DrainMode) -> DrainMode:
    """A drain mode; None means the configured default."""
    match mode:
        case None:
            return default
        case "abort" | "wait" | "keep":
            return mode
    raise InvalidRequest(f"mode must be 'abort', 'wait' or 'keep', got {mode!r}.", param="mode")


def parse_timeout(timeout_s: float | None, default: float) -> float:
    """How many seconds a drain may take; None means the configured default."""
    if timeout_s is None:
        return default
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or math.isnan(timeout_s) or timeout_s < 0:
        raise InvalidRequest(f"timeout_s must be a number of seconds, 0 or more, got {timeout_s!r}.", param="timeout_s")
    return timeout_s


_NO_ARGUMENTS: tuple[tuple[Any, ...], ...] = ((),)

RPC_VERBS: Mapping[str, tuple[tuple[Any, ...], ...]] = {
    "facts": _NO_ARGUMENTS,
    "missing": _NO_ARGUMENTS,
    "residual_bytes": _NO_ARGUMENTS,
    "states": _NO_ARGUMENTS,
    "verify": tuple((mode,) for mode in get_args(VerifyMode)),
    "weights_source": _NO_ARGUMENTS,
}

"""Questions to a rank, each with the arguments that it may have. One more verb is none: `ReloadCall`'s."""


def check_rpc(method: str, args: Sequence[Any]) -> None:
    """Refuse what may not be called.

    Raises:
        InvalidRequest: names the verbs, or the arguments, that may be used.
    """
    if method == ReloadCall.verb and (not args or (len(args) == 1 and isinstance(args[0], str) and args[0])):
        return
    allowed = ((), ("PATH",)) if method == ReloadCall.verb else RPC_VERBS.get(method)
    if allowed is None:
        raise InvalidRequest(
            f"collective_rpc cannot call {method!r}; it can call {', '.join((*RPC_VERBS, ReloadCall.verb))}.",
            param="method",
        )
    if tuple(args) not in allowed:
        listed = " or ".join(str(list(one)) for one in allowed)
        raise InvalidRequest(f"args of {method!r} must be {listed}, got {list(args)}.", param="args")
