"""The engine core: one scheduler, one sleep controller, one executor, advanced step by step.

Knows nothing of text, processes or sockets; `step` never blocks on anything but the executor.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, replace
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
)
from shuteye.engine.scheduler import Scheduler
from shuteye.engine.sleep import SleepController, parse_level, parse_mode, parse_tags, parse_timeout
from shuteye.errors import (
    DrainTimeout,
    EngineFaulted,
    InvalidRequest,
    ModelSleeping,
    ShuteyeError,
    SleepModeDisabled,
    TransitionConflict,
)
from shuteye.executors.base import Executor
from shuteye.outputs import (
    EngineState,
    ErrorInfo,
    ModelInfo,
    RequestDelta,
    SchedulerStats,
    SleepReport,
    UpdateReport,
    WakeReport,
)
from shuteye.plans import ModelFacts, SleepPlan
from shuteye.request import DrainMode, GenerateRequest

RPC_VERBS = ("facts", "missing", "residual_bytes", "states", "verify", "weights_source")
"""What `collective_rpc` may call: verbs that change nothing, or they would go behind the sleep controller's back."""

Report = SleepReport | WakeReport | UpdateReport | list[Any] | None
Steps = Generator[None, None, Report]
"""A transition under way: each `next` is one look whether it can go on; the return value is its report."""


REFRESH_EVERY_S = 1.0
"""How old the state's account of resident memory may be while requests run."""


@dataclass(slots=True)
class Transition:
    """A control call on its way: waiting, under way (`steps`), or answered through `answer`."""

    call: ControlCall
    answer: Callable[[Report | ShuteyeError], None]
    steps: Steps | None = None


def info_of(error: ShuteyeError) -> ErrorInfo:
    """An error as it travels between processes."""
    return ErrorInfo(kind=type(error).__name__, message=error.message, param=error.param)


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
        num_blocks = config.kv_cache_memory // (facts.kv_bytes_per_token * config.block_size)
        executor.call("allocate_kv_cache", num_blocks)
        self.info = _model_info(config, facts, num_blocks)
        self._scheduler = Scheduler(
            num_blocks=num_blocks,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=config.max_model_len,
            eos_token_ids=facts.eos_token_ids,
            enable_prefix_caching=config.enable_prefix_caching,
        )
        self._sleep = SleepController(
            executor, verify=config.verify_wake, canary=config.canary and config.enable_sleep_mode
        )
        self._sleep.check_loaded()
        self._refreshed_at = time.monotonic()
        self._held = HeldRequests(limit=config.hold_queue_size)
        self._transitions: deque[Transition] = deque()
        self._closing_for_sleep = False
        self._waking_for_requests = False
        self._deltas: list[RequestDelta] = []

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
        """When (monotonic seconds) the next held request expires."""
        return self._held.next_deadline

    def add(self, request: GenerateRequest) -> None:
        """Run, hold or refuse a request, as the gate and the policy say; the next `step` reports a refusal."""
        try:
            self._scheduler.check(request)
            self._admit(request)
        except ShuteyeError as error:
            self._deltas.append(RequestDelta(request.request_id, error=info_of(error)))

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests at once, wherever they are; unknown ids are ignored (they have finished)."""
        request_ids = tuple(request_ids)
        self._deltas += self._held.abort(request_ids)
        self._deltas += self._scheduler.abort(request_ids)

    def submit(self, call: ControlCall, answer: Callable[[Report | ShuteyeError], None]) -> None:
        """Queue a control call; `answer` is called exactly once, during some later `step`."""
        self._transitions.append(Transition(call, answer))

    def step(self) -> list[RequestDelta]:
        """Advance the oldest control call as far as it goes, then run one step of the model if the gate lets it."""
        self._advance_transitions()
        self._release_held()
        self._deltas += self._held.expire(time.monotonic())
        if self._sleep.state.gate != "closed":
            self._run_model()
        deltas, self._deltas = self._deltas, []
        return deltas

    def close(self) -> None:
        """End every rank; unanswered control calls are not answered."""
        self._executor.close()

    # --- requests -------------------------------------------------------------------------------

    def _run_model(self) -> None:
        plan = self._scheduler.schedule()
        if plan is None:
            return
        try:
            result = self._executor.execute(plan)
        except ShuteyeError as error:
            self._deltas += self._scheduler.fail_step(plan, info_of(error))
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

    def _admit(self, request: GenerateRequest) -> None:
        state = self._sleep.state
        self._sleep.refuse_if_faulted()
        if state.gate == "open":
            self._scheduler.add(request)
        elif not (state.is_sleeping or self._closing_for_sleep):
            self._held.add(request, deadline=None)  # only paused: resume runs it
        elif self.config.on_sleeping_request == "reject":
            raise ModelSleeping
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
            if isinstance(outcome, TransitionConflict):
                outcome = ModelSleeping()
            if isinstance(outcome, ShuteyeError):
                self._deltas += self._held.fail(info_of(outcome))

        self.submit(WakeCall(), answer)

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
            return self._unchanged(begin)
        self._sleep.check_room(plan)
        self._closing_for_sleep = True
        try:
            yield from self._drain(mode, call.timeout_s)
            self._sleep.save(plan)  # before requests are ended: if it fails, they go on
            ended, held = self._empty_batch(mode)
            if plan.kv_cache == "discard" or plan.weights != "keep":
                self._scheduler.reset_prefix_cache()
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
        if state.dozing:
            return self._unchanged(begin)
        ended, held = yield from self._closed_by_pause(mode, call.timeout_s)
        self._sleep.set_gate(dozing=True)
        return SleepReport(
            changed=True,
            level=0,
            residual_bytes=sum(self._executor.call("residual_bytes")),
            seconds=time.perf_counter() - begin,
            aborted_requests=ended,
            held_requests=held,
        )

    def _unchanged(self, begin: float) -> SleepReport:
        level = self._sleep.state.level
        assert level is not None
        return SleepReport(
            changed=False,
            level=level,
            residual_bytes=sum(self._executor.call("residual_bytes")),
            seconds=time.perf_counter() - begin,
        )

    def _wake_steps(self, call: WakeCall) -> Steps:
        yield from ()
        return self._sleep.wake(parse_tags(call.tags))

    def _pause_steps(self, call: PauseCall) -> Steps:
        mode = parse_mode(call.mode, self.config.default_sleep_mode)
        if not self._sleep.state.paused:
            yield from self._closed_by_pause(mode, call.timeout_s)
            self._sleep.set_gate(paused=True)
        return None

    def _resume_steps(self, _call: ResumeCall) -> Steps:
        yield from ()
        state = self._sleep.state
        self._sleep.refuse_if_faulted()
        if state.is_sleeping:
            raise TransitionConflict("Cannot resume while asleep; wake up first with a POST request to /wake_up.")
        self._sleep.set_gate(paused=False, dozing=False)
        return None

    def _update_steps(self, call: UpdateCall | ReloadCall) -> Steps:
        """Between two steps of the model: requests in flight are recomputed, so none mixes old and new weights."""
        yield from ()
        state = self._sleep.state
        self._sleep.refuse_if_faulted()
        if state.residency("weights") not in ("resident", "blank"):
            raise TransitionConflict(
                f"Weights can only be written while they are mapped, and they are {state.residency('weights')}; "
                'wake them first: wake_up(tags=["weights"]).'
            )
        self._scheduler.preempt_all()
        self._scheduler.reset_prefix_cache()
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
        if call.verb not in RPC_VERBS:
            raise InvalidRequest(
                f"collective_rpc cannot call {call.verb!r}; it can call {', '.join(RPC_VERBS)}.", param="method"
            )
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


def _model_info(config: EngineConfig, facts: ModelFacts, num_blocks: int) -> ModelInfo:
    assert config.kv_cache_memory is not None
    assert config.max_model_len is not None
    return ModelInfo(
        model=config.model,
        architecture=facts.architecture,
        task=facts.task,
        tokenizer_dir=facts.tokenizer_dir,
        image_dir=facts.image_dir,
        dtype=facts.dtype,
        vocab_size=facts.vocab_size,
        max_model_len=config.max_model_len,
        block_size=config.block_size,
        num_blocks=num_blocks,
        eos_token_ids=facts.eos_token_ids,
        weights_bytes=facts.weights_bytes,
        kv_cache_bytes=config.kv_cache_memory,
        kv_bytes_per_token=facts.kv_bytes_per_token,
        default_sampling=facts.default_sampling,
    )
