"""The engine core: one scheduler, one sleep controller, one executor, advanced step by step.

Knows nothing of text, processes or sockets; `step` never blocks on anything but the executor.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from typing import Any

from shuteye.config import EngineConfig
from shuteye.engine.held import HeldRequests
from shuteye.engine.messages import (
    ControlCall,
    PauseCall,
    ReloadCall,
    ResetPrefixCacheCall,
    ResumeCall,
    RpcCall,
    SleepCall,
    UpdateCall,
    WakeCall,
    check_rpc,
)
from shuteye.engine.sleep import SleepController, parse_level, parse_mode, parse_tags, parse_timeout
from shuteye.engine.transitions import Report, Steps, Transition
from shuteye.errors import (
    DrainTimeout,
    EngineFaulted,
    ModelPaused,
    ModelSleeping,
    QueueFull,
    ShuteyeError,
    SleepModeDisabled,
    TransitionConflict,
    VerificationFailed,
    info_of,
    refusal,
)
from shuteye.executors.base import Executor
from shuteye.model_info import ModelFacts, model_info
from shuteye.state import DrainMode, EngineState, SchedulerStats, SleepPlan, SleepReport, UpdateReport, WakeReport
from shuteye.tasks.base import Delta, RequestDelta
from shuteye.tasks.table import Request, open_scheduler, require_kind, starts_of

REFRESH_EVERY_S = 1.0
"""How old the state's account of resident memory may be while requests run."""


class EngineCore:
    """Runs requests while the gate is open, and control calls one after the other.

    Args:
        config: as given by the user; `self.config` is the completed one.
        executor: its ranks have loaded their weights, and have no KV cache yet.

    Raises:
        ShuteyeError: the KV cache does not fit, or the canary's first pass failed.
    """

    def __init__(self, config: EngineConfig, executor: Executor) -> None:
        self._executor = executor
        facts: ModelFacts = executor.call("facts")[0]
        self.config = config = config.resolve(facts)
        assert config.kv_cache_memory is not None
        assert config.max_model_len is not None
        block_bytes = facts.kv_bytes_per_token * config.block_size
        num_blocks = config.kv_cache_memory // block_bytes if block_bytes else 0
        executor.call("allocate_kv_cache", num_blocks)
        self.info = model_info(config, facts, num_blocks)
        self._deltas: list[Delta] = []
        self._scheduler = open_scheduler(config, facts, num_blocks=num_blocks, report=self._report)
        self._sleep = SleepController(
            executor, verify=config.verify_wake, canary=config.canary and config.enable_sleep_mode
        )
        self._sleep.check_loaded()
        self._refreshed_at = time.monotonic()
        self._held = HeldRequests(limit=config.hold_queue_size)
        self._transitions: deque[Transition] = deque()
        self._closing_for_sleep = False
        self._waking_for_requests = False
        self._own_wakes: list[WakeReport | ShuteyeError] = []
        self._started: list[tuple[str, float]] = []
        self._give_up_at: float | None = None

    # --- what callers see -----------------------------------------------------------------------

    @property
    def state(self) -> EngineState:
        """The sleep state now."""
        call = self._transitions[0].call if self._transitions else None
        return self._sleep.state.snapshot(type(call).__name__.removesuffix("Call").lower() if call else None)

    @property
    def stats(self) -> SchedulerStats:
        """Scheduler counters, with held requests counted as waiting."""
        stats = self._scheduler.stats()
        return replace(stats, num_waiting=stats.num_waiting + len(self._held))

    @property
    def can_step(self) -> bool:
        """True if `step` would do something now."""
        running = self._sleep.state.gate != "closed" and self._scheduler.has_unfinished
        return running or bool(self._transitions) or bool(self._deltas)

    @property
    def next_deadline(self) -> float | None:
        """When (monotonic seconds) the next request that waits for the gate is given up."""
        deadlines = (self._held.next_deadline, self._give_up_at)
        return min((one for one in deadlines if one is not None), default=None)

    def take_own_wakes(self) -> list[WakeReport | ShuteyeError]:
        """How the wakes ended that nobody asked for but the policy, since the last call of this."""
        taken, self._own_wakes = self._own_wakes, []
        return taken

    def take_started(self) -> tuple[tuple[str, float], ...]:
        """Sequences that got their place in the batch since the last call of this, and when (monotonic seconds)."""
        taken, self._started = tuple(self._started), []
        return taken

    def add(self, request: Request) -> None:
        """Run, hold or refuse a request, as the gate and the policy say; the next `step` reports a refusal."""
        try:
            require_kind(self.info.task, request)
            self._scheduler.check(request)
            self._admit(request)
        except Exception as error:  # noqa: BLE001 (whatever it is, it costs no more than this request, and is told)
            if not isinstance(error, ShuteyeError):  # ours come before anything has changed
                self._held.abort([request.request_id])
                self._scheduler.abort([request.request_id])
            self._deltas.append(RequestDelta(request.request_id, error=info_of(refusal(error, "The request"))))

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests at once, wherever they are; unknown ids are ignored (they have finished)."""
        request_ids = tuple(request_ids)
        self._deltas += self._held.abort(request_ids)
        self._deltas += self._scheduler.abort(request_ids)

    def submit(self, call: ControlCall, answer: Callable[[Report | ShuteyeError], None]) -> None:
        """Queue a control call; `answer` is called exactly once, during some later `step`."""
        self._transitions.append(Transition(call, answer))

    def step(self) -> list[Delta]:
        """Advance the oldest control call as far as it goes, then run one step of the model if the gate lets it."""
        self._advance_transitions()
        self._release_held()
        self._deltas += self._held.expire(time.monotonic())
        if self._sleep.state.gate != "closed":
            self._run_model()
        self._give_up_after_fault()
        deltas, self._deltas = self._deltas, []
        return deltas

    def close(self) -> None:
        """End every rank; unanswered control calls are not answered."""
        self._executor.close()

    # --- requests -------------------------------------------------------------------------------

    def _report(self, refusal: RequestDelta) -> None:
        """The scheduler found a request wrong that it had let in."""
        self._deltas.append(refusal)

    def _run_model(self) -> None:
        self._scheduler.enter_epoch(self._sleep.state.epoch)
        plan = self._scheduler.schedule()
        if plan is None:
            return
        if starts := starts_of(plan):
            now = time.monotonic()
            self._started += [(request_id, now) for request_id in starts]
        try:
            result = self._executor.execute(plan)
        except VerificationFailed as error:  # of the canary that went with the step, or of the image under it
            self._deltas += self._scheduler.fail_step(plan, info_of(error))
            self._sleep.fault(error.message)
        except ShuteyeError as error:
            self._deltas += self._scheduler.fail_step(plan, info_of(error))
            self._refreshed_at = -math.inf  # whatever went wrong, look again where memory is before the next step
        else:
            self._deltas += self._scheduler.update(plan, result)
        self._account()

    def _account(self) -> None:
        """Requests touch KV memory: now and then, and whenever the batch runs empty, ask how much there is."""
        now = time.monotonic()
        if now - self._refreshed_at > REFRESH_EVERY_S or not self._scheduler.has_unfinished:
            self._refreshed_at = now
            with contextlib.suppress(EngineFaulted):  # if a rank cannot tell, the state says so, and nothing is served
                self._sleep.refresh()

    def _admit(self, request: Request) -> None:
        state = self._sleep.state
        self._sleep.refuse_if_faulted()
        if state.gate == "open":
            limit = self.config.max_waiting_requests
            if self._scheduler.num_waiting >= limit:
                raise QueueFull(f"{limit} requests are waiting already, as many as may (--max-waiting-requests).")
            self._scheduler.add(request)
            return
        asleep = state.is_sleeping or self._closing_for_sleep
        if asleep and self.config.on_sleeping_request == "reject":
            raise ModelSleeping
        if state.refusing:
            raise ModelPaused
        if not asleep:
            self._held.add(request, deadline=None)  # only paused: resume runs it
        else:
            self._held.add(request, deadline=time.monotonic() + self.config.hold_timeout_s)
            if self.config.on_sleeping_request == "wake":
                self._wake_for_requests()

    def _wake_for_requests(self) -> None:
        """Wake once, however many requests ask for it; if that fails, so do those it was meant for."""
        if self._waking_for_requests:
            return
        self._waking_for_requests = True

        def answer(outcome: Report | ShuteyeError) -> None:
            self._waking_for_requests = False
            assert isinstance(outcome, WakeReport | ShuteyeError), "a wake is answered with its report or an error"
            self._own_wakes.append(outcome)
            if isinstance(outcome, TransitionConflict):
                outcome = ModelSleeping()
            if isinstance(outcome, ShuteyeError):
                self._deltas += self._held.fail(info_of(outcome))

        self.submit(WakeCall(for_requests=True), answer)

    def _give_up_after_fault(self) -> None:
        """Requests in flight outlive a fault in hope of a recovery, but only for `hold_timeout_s`; then they fail."""
        reason = self._sleep.state.faulted
        if reason is None or not (self._scheduler.has_unfinished or self._held):
            self._give_up_at = None
            return
        now = time.monotonic()
        if self._give_up_at is None:
            self._give_up_at = now + self.config.hold_timeout_s
        elif now >= self._give_up_at:
            error = info_of(EngineFaulted(f"The engine is faulted ({reason}), and was not recovered in time."))
            self._deltas += [RequestDelta(one.request_id, error=error) for one in self._scheduler.abort_all()]
            self._deltas += self._held.fail(error)
            self._give_up_at = None

    def _release_held(self) -> None:
        if self._sleep.state.gate == "open":
            for request in self._held.take():
                self.add(request)

    # --- control calls --------------------------------------------------------------------------

    def _advance_transitions(self) -> None:
        while self._transitions:
            self._release_held()  # what the last one let in runs, or is drained by the next one
            transition = self._transitions[0]
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
            self._transitions.popleft()
            transition.answer(outcome)

    def _start(self, call: ControlCall) -> Steps:
        state = self._sleep.state
        recovers = isinstance(call, WakeCall) and (state.is_sleeping or state.faulted)  # from a reload that failed
        if isinstance(call, SleepCall | WakeCall) and not self.config.enable_sleep_mode and not recovers:
            raise SleepModeDisabled("Sleep mode is off; start the engine with enable_sleep_mode (--enable-sleep-mode).")
        starts: dict[type, Callable[[Any], Steps]] = {
            SleepCall: self._sleep_steps,
            WakeCall: self._wake_steps,
            PauseCall: self._pause_steps,
            ResumeCall: self._resume_steps,
            UpdateCall: self._update_steps,
            ReloadCall: self._update_steps,
            ResetPrefixCacheCall: self._reset_prefix_cache_steps,
            RpcCall: self._rpc_steps,
        }
        return starts[type(call)](call)

    def _sleep_steps(self, call: SleepCall) -> Steps:
        begin = time.perf_counter()
        level, tags = parse_level(call.level), parse_tags(call.tags)
        mode = parse_mode(call.mode, self.config.default_sleep_mode)
        if level == 0:
            return (yield from self._doze_steps(call, mode, begin))
        plan = self._sleep.plan_sleep(level, tags)
        if plan == SleepPlan():
            return self._at_rest(begin, *self._empty_batch(mode))
        self._sleep.check_room(plan)
        self._closing_for_sleep = True
        try:
            yield from self._drain(mode, call.timeout_s)
            self._sleep.save(plan)  # before requests are ended: if it fails, they go on
            ended, held = self._empty_batch(mode)
            self._scheduler.reset_prefix_cache()  # the release is another epoch; this gives compiled grammars back, too
            report = self._sleep.release(plan, begin=begin)
        finally:
            self._closing_for_sleep = False
            self._sleep.set_gate(draining=False)
        self._held.bound(time.monotonic() + self.config.hold_timeout_s)
        return replace(report, aborted_requests=ended, held_requests=held)

    def _doze_steps(self, call: SleepCall, mode: DrainMode, begin: float) -> Steps:
        """Level 0: a pause that wake_up lifts."""
        self._sleep.refuse_if_faulted()
        state = self._sleep.state
        if state.is_sleeping:
            raise TransitionConflict(f"Cannot sleep at level 0: asleep at level {state.level}, which is deeper.")
        ended, held = yield from self._closed_by_pause(mode, call.timeout_s)
        self._sleep.set_gate(dozing=True)
        return replace(self._at_rest(begin, ended, held), changed=not state.dozing)

    def _at_rest(self, begin: float, ended: int, held: int) -> SleepReport:
        """The report of a sleep that moved no memory, but may have aborted requests that were held."""
        level = self._sleep.state.level
        assert level is not None
        return SleepReport(
            changed=False,
            level=level,
            residual_bytes=sum(self._executor.call("residual_bytes")),
            seconds=time.perf_counter() - begin,
            aborted_requests=ended,
            held_requests=held,
        )

    def _wake_steps(self, call: WakeCall) -> Steps:
        yield from ()
        report = self._sleep.wake(parse_tags(call.tags), prove_first_step=call.for_requests)
        if not self._sleep.state.is_sleeping:
            self._held.unbound()
        return report

    def _pause_steps(self, call: PauseCall) -> Steps:
        mode = parse_mode(call.mode, self.config.default_sleep_mode)
        before = self._sleep.state.refusing
        self._sleep.set_gate(refusing=mode != "keep")  # from now on: a drain would never end otherwise
        try:
            yield from self._closed_by_pause(mode, call.timeout_s)
        except ShuteyeError:
            self._sleep.set_gate(refusing=before)
            raise
        self._sleep.set_gate(paused=True)
        return None

    def _resume_steps(self, _call: ResumeCall) -> Steps:
        yield from ()
        state = self._sleep.state
        self._sleep.refuse_if_faulted()
        if state.is_sleeping:
            raise TransitionConflict("Cannot resume while asleep; wake up first with a POST request to /wake_up.")
        self._sleep.set_gate(paused=False, refusing=False, dozing=False)
        return None

    def _update_steps(self, call: UpdateCall | ReloadCall) -> Steps:
        """Between two steps of the model. What was written is another epoch, so requests in flight are recomputed."""
        yield from ()
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
                case UpdateCall(path=str(path)):
                    reports = self._executor.call("update_weights_from_file", path)
                case UpdateCall(named_tensors=named_tensors):
                    reports = self._executor.call("update_weights", named_tensors)
        except EngineFaulted as error:
            raise self._sleep.fault(error.message) from error
        finally:  # also after an update that broke off: what it had written is there
            self._sleep.refresh()
            if not self._sleep.state.faulted:
                self._sleep.check_after_update(reloaded=isinstance(call, ReloadCall))
        return reports[0]

    def _reset_prefix_cache_steps(self, _call: ResetPrefixCacheCall) -> Steps:
        yield from ()
        self._scheduler.reset_prefix_cache()
        return None

    def _rpc_steps(self, call: RpcCall) -> Steps:
        yield from ()
        check_rpc(call.verb, call.args)
        return self._executor.call(call.verb, *call.args)

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
        patience_s = parse_timeout(timeout_s, self.config.drain_timeout_s)
        self._sleep.set_gate(draining=True)
        if mode != "wait" or self._sleep.state.gate == "closed":
            return
        deadline = time.monotonic() + patience_s
        while self._scheduler.has_unfinished:
            if time.monotonic() > deadline:
                unfinished = self._scheduler.num_running + self._scheduler.num_waiting
                raise DrainTimeout(
                    f"{unfinished} requests outlasted the deadline; nothing was put to sleep and they go on. "
                    "Use mode=abort or mode=keep, or a longer timeout."
                )
            yield

    def _empty_batch(self, mode: DrainMode) -> tuple[int, int]:
        """Take every request out of the batch as `mode` says: how many were aborted, and how many are held."""
        if mode == "abort":
            ended = self._scheduler.abort_all() + self._held.abort_all()
            self._deltas += ended
            return len(ended), 0
        self._scheduler.preempt_all()
        return 0, self._scheduler.num_waiting + len(self._held)
