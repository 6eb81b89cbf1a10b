"""The engine core: one scheduler, one sleep controller, one executor, advanced step by step.

Knows nothing of text, processes or sockets; `step` never blocks on anything but the executor.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace

from shuteye.calls import ControlCall
from shuteye.config import EngineConfig
from shuteye.engine.controller import SleepController
from shuteye.engine.held import HeldRequests
from shuteye.engine.transitions import Report, Transitions, WakeForRequests
from shuteye.errors import (
    EngineFaulted,
    ModelPaused,
    ModelSleeping,
    QueueFull,
    RankLost,
    ShuteyeError,
    TransitionConflict,
    VerificationFailed,
    info_of,
    refusal,
)
from shuteye.executors import Executor, Ticket
from shuteye.model_info import ModelSpec, model_info, sum_facts
from shuteye.state import EngineState, SchedulerStats, WakeReport
from shuteye.tasks.base import Delta, RequestDelta
from shuteye.tasks.table import TASKS, Request, SchedulerSetup, require_kind

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
        spec: ModelSpec = sum_facts(executor.call("facts"))
        self.config = config = config.resolve(spec)
        assert config.kv_cache_memory is not None
        block_bytes = spec.kv_bytes_per_token * config.block_size
        num_blocks = config.kv_cache_memory // block_bytes if block_bytes else 0
        executor.call("allocate_kv_cache", num_blocks)
        self.info = model_info(config, spec, num_blocks)
        self._scheduler = TASKS[spec.task].open_scheduler(
            SchedulerSetup(config, spec, num_blocks, report=self._tell, max_in_flight=executor.max_in_flight)
        )
        self._in_flight: deque[Ticket] = deque()  # steps that the executor has, oldest first
        self._held = HeldRequests(limit=config.hold_queue_size)
        self._sleep = SleepController(
            executor, verify=config.verify_wake, canary=config.canary and config.enable_sleep_mode
        )
        self._sleep.check_loaded()
        executor.on_failure_in_call(self._sleep.look_after_ranks)
        self._transitions = Transitions(
            config, executor, self._sleep, scheduler=self._scheduler, held=self._held, report=self._tell
        )
        # What has happened and was not yet given out by `step`, `take_started` and `take_auto_wakes`.
        self._deltas: list[Delta] = []
        self._started: list[tuple[str, float]] = []
        self._auto_wakes: list[WakeReport | ShuteyeError] = []
        # Times are of the monotonic clock, in seconds.
        self._refreshed_at = time.monotonic()
        self._give_up_at: float | None = None  # what a fault has caught
        self._fault_reason = ""
        self._waking_for_requests = False
        self._num_restarts = 0  # of ranks, that the scheduler knows of

    # --- what callers see -----------------------------------------------------------------------

    @property
    def state(self) -> EngineState:
        """The sleep state now."""
        return self._sleep.state.snapshot(self._transitions.under_way)

    @property
    def stats(self) -> SchedulerStats:
        """Scheduler counters, with held requests counted as waiting."""
        stats = self._scheduler.stats()
        return replace(stats, num_waiting=stats.num_waiting + len(self._held))

    @property
    def can_step(self) -> bool:
        """True if `step` would do something now."""
        running = self._sleep.state.gate != "closed" and self._scheduler.has_unfinished
        return running or bool(self._transitions) or bool(self._deltas) or bool(self._in_flight)

    @property
    def next_deadline(self) -> float | None:
        """When (monotonic seconds) the next request that waits for the gate is given up."""
        deadlines = (self._held.next_deadline, self._give_up_at)
        return min((one for one in deadlines if one is not None), default=None)

    def on_fault(self, tell: Callable[[], None]) -> None:
        """Call `tell` as soon as the state says that nothing can be served, also in the middle of a step."""
        self._sleep.on_fault = tell

    def take_auto_wakes(self) -> list[WakeReport | ShuteyeError]:
        """How wakes ended that the policy began for requests, since the last call of this."""
        taken, self._auto_wakes = self._auto_wakes, []
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
        except Exception as error:  # noqa: BLE001 (whatever it is, it refuses this request and no other)
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
        self._transitions.submit(call, answer)

    def step(self) -> list[Delta]:
        """Advance the oldest control call as far as it goes, then run one step of the model if the gate lets it.

        A control call finds no step in flight. Between two calls of this there may be some, all but one of the most.
        """
        self._sleep.look_after_ranks()
        if self._in_flight and (self._transitions or self._sleep.state.gate == "closed"):
            self._settle()
            self._account()
        self._transitions.advance(before_each=self._release_held)
        self._release_held()
        self._deltas += self._held.expire(time.monotonic())
        if self._sleep.state.gate != "closed":
            self._run_model()
        self._give_up_after_fault()
        deltas, self._deltas = self._deltas, []
        return deltas

    # --- requests -------------------------------------------------------------------------------

    def _tell(self, deltas: Iterable[Delta]) -> None:
        self._deltas += deltas

    def _run_model(self) -> None:
        """Let the ranks have as many steps as they can work at, then take the outcome of the oldest."""
        while len(self._in_flight) < self._depth and self._post_step():
            pass
        if self._in_flight:
            self._collect_step()
            self._account()

    @property
    def _depth(self) -> int:
        """How many steps may be in flight: a wake that is yet to be proven is by one step alone."""
        return 1 if self._sleep.proof_pending else self._executor.max_in_flight

    def _settle(self) -> None:
        """Take the outcomes of all steps in flight."""
        while self._in_flight:
            self._collect_step()

    def _post_step(self) -> bool:
        """Plan a step and give it to the ranks; False if there is nothing to do until others have come back."""
        if self._num_restarts != self._sleep.num_restarts:
            self._num_restarts = self._sleep.num_restarts
            self._scheduler.readmit_all()
        self._scheduler.enter_epoch(self._sleep.state.epoch)
        plan = self._scheduler.schedule()
        if plan is None:
            return False
        now = time.monotonic()
        self._started += [(request_id, now) for request_id in plan.starts]
        self._in_flight.append(self._executor.post(plan))
        return True

    def _collect_step(self) -> None:
        """Wait for the oldest step, and do what its outcome asks for."""
        ticket = self._in_flight.popleft()
        plan = ticket.plan
        try:
            result = self._executor.collect(ticket)
        except VerificationFailed as error:  # of the canary that went with the step, or of the image under it
            self._deltas += self._scheduler.fail_step(plan, info_of(error))
            self._drop_steps()
            self._sleep.fault(error.message)
        except RankLost as error:
            self._scheduler.drop_step(plan)
            self._drop_steps()
            self._sleep.fault(error.message)
        except ShuteyeError as error:
            self._deltas += self._scheduler.fail_step(plan, info_of(error))
            self._drop_steps()
            with contextlib.suppress(EngineFaulted):  # the state says so
                self._sleep.step_ended(well=False)
            self._refreshed_at = -math.inf  # whatever went wrong, look again where memory is before the next step
        else:
            self._deltas += self._scheduler.update(plan, result)
            self._sleep.step_ended(well=True)

    def _drop_steps(self) -> None:
        """Behind a step that failed nothing counts: it may build on what was not computed. It is computed again.

        What became of those steps on each rank is not known, so that samplers are told of all requests anew.
        """
        dropped = bool(self._in_flight)
        while self._in_flight:
            ticket = self._in_flight.popleft()
            with contextlib.suppress(ShuteyeError):  # it failed as the one before did, or is not wanted
                self._executor.collect(ticket)
            self._scheduler.drop_step(ticket.plan)
        if dropped:
            self._scheduler.readmit_all()

    def _account(self) -> None:
        """Requests touch KV memory: now and then, and whenever the batch runs empty, ask how much there is."""
        if time.monotonic() - self._refreshed_at > REFRESH_EVERY_S or not self._scheduler.has_unfinished:
            self._settle()
            self._refreshed_at = time.monotonic()
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
        asleep = state.is_sleeping or self._transitions.closing_for_sleep
        if asleep and self.config.on_sleeping_request == "reject":
            raise ModelSleeping
        if state.refusing:
            raise ModelPaused
        # What is only paused waits for a resume, as long as that takes.
        self._held.add(request, deadline=time.monotonic() + self.config.hold_timeout_s if asleep else None)
        if asleep and self.config.on_sleeping_request == "wake" and not self._waking_for_requests:
            self._wake_for_requests()

    def _wake_for_requests(self) -> None:
        """Wake once, however many requests wait for it; if that fails, so do they."""
        self._waking_for_requests = True

        def answer(outcome: Report | ShuteyeError) -> None:
            self._waking_for_requests = False
            assert isinstance(outcome, WakeReport | ShuteyeError), "a wake is answered with its report or an error"
            self._auto_wakes.append(outcome)
            if isinstance(outcome, TransitionConflict):
                outcome = ModelSleeping()
            if isinstance(outcome, ShuteyeError):
                self._deltas += self._held.fail(info_of(outcome))

        self._transitions.submit(WakeForRequests(), answer)

    def _give_up_after_fault(self) -> None:
        """Requests in flight wait for a fault to be recovered, but only for `hold_timeout_s`; then they fail.

        A recovery that ends asleep, as the wake that it is part of has failed, is none for them.
        """
        state = self._sleep.state
        if state.faulted is not None:
            self._fault_reason = state.faulted
        recovered = state.faulted is None and not (state.is_sleeping and self._give_up_at is not None)
        if recovered or not (self._scheduler.has_unfinished or self._held):
            self._give_up_at = None
            return
        now = time.monotonic()
        if self._give_up_at is None:
            self._give_up_at = now + self.config.hold_timeout_s
        elif now >= self._give_up_at:
            reason = self._fault_reason
            error = info_of(EngineFaulted(f"The engine was faulted ({reason}), and not recovered in time."))
            self._deltas += [RequestDelta(one.request_id, error=error) for one in self._scheduler.abort_all()]
            self._deltas += self._held.fail(error)
            self._give_up_at = None

    def _release_held(self) -> None:
        if self._sleep.state.gate == "open":
            for request in self._held.take():
                self.add(request)
