"""An engine without a model, for tests of the server: the seam's verbs over a fake model and a fake memory."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from fake_memory import NBYTES, gated, moved, slept, woken, written
from fake_model import Choices, byte_tokenizer, model_of, output_of

from shuteye.calls import PauseCall, ReloadCall, ResetPrefixCacheCall, ResumeCall, RpcCall, SleepCall, WakeCall
from shuteye.config import EngineConfig
from shuteye.engine.transitions import check_rpc, parse_level, parse_mode, parse_tags
from shuteye.errors import (
    DrainTimeout,
    EngineDead,
    EngineNotReady,
    InvalidRequest,
    ModelSleeping,
    QueueFull,
    ShuteyeError,
    SleepModeDisabled,
    TransitionConflict,
)
from shuteye.frontend.engine import Engine, EngineView
from shuteye.state import EngineState, SchedulerStats, SleepReport, UpdateReport
from shuteye.tasks.generate.outputs import GenerationJob
from shuteye.tokenizer import Tokenizer


@dataclass
class FakeEngine(Engine):
    """`start_gate`, if given, is awaited by `start`; after `break_after` tokens `breakage` is raised.

    `aborts` every request before its prompt is computed; `script` is what choice i says, in place of its prompt.
    """

    config: EngineConfig = field(default=None)
    tokenizer_: Tokenizer = field(default_factory=byte_tokenizer)
    token_delay_s: float = 0.0
    start_gate: asyncio.Event | None = None
    start_error: Exception | None = None
    breakage: Exception | None = None
    break_after: int = 2
    aborts: bool = False
    default_sampling: dict[str, float] = field(default_factory=dict)
    task: str = "generate"
    script: Sequence[str] = ()

    status = state = stats = failure = hang = None  # in place of the properties: tests set them

    def __post_init__(self):
        self.status, self.state = "starting", EngineState()
        self.stats = SchedulerStats(num_blocks=10, num_free_blocks=10)
        self.running = {}  # whether it is aborted, by request id
        self.aborted, self.seen, self.reloaded, self.updated = [], [], [], []
        self.held = self.prefix_resets = self.restarts = 0
        self._changed = asyncio.Condition()

    # --- life, and what is known ----------------------------------------------------------------

    async def start(self):
        if self.start_gate is not None:
            await self.start_gate.wait()
        await asyncio.sleep(0)
        if self.status == "closed":
            raise self.failure
        if self.start_error is not None:
            if isinstance(self.start_error, ShuteyeError):
                self.status, self.failure = "failed", self.start_error
            raise self.start_error
        self.status, self.state = "ready", moved(self.state, weights="resident", kv_cache="resident")

    async def close(self, reason=None):
        if self.status != "closed":
            self.status, self.failure = "closed", self.failure or reason or EngineDead("The engine was closed.")
            if self.start_gate is not None:
                self.start_gate.set()
            await self._notify()

    async def restart(self):
        self.restarts += 1
        self.status, self.failure, self.hang = "starting", None, None
        await self.start()

    async def die(self):
        """As if the engine process had been killed."""
        self.status, self.failure = "dead", EngineDead("The engine process ended (signal 9).")
        await self._notify()

    @property
    def view(self):
        return EngineView(self.config, self.status, self.failure, self.hang, self.state, self.stats)

    @property
    def model(self):
        if self.failure is not None:
            raise self.failure
        if self.status == "starting":
            raise EngineNotReady("The model is still loading.")
        return model_of(self.config, self.task, self.tokenizer_, self.default_sampling)

    async def _notify(self):
        async with self._changed:
            self._changed.notify_all()

    # --- requests -------------------------------------------------------------------------------

    def stream(self, job, *, request_id=None, backlog=None):
        return self._generate(job, request_id) if isinstance(job, GenerationJob) else self._at_once(job)

    async def _at_once(self, job):
        output = output_of(job, self.model)
        await self._admit()
        await asyncio.sleep(self.token_delay_s)
        if self.breakage is not None:
            raise self.breakage
        yield output

    async def _generate(self, job, request_id):
        choices = Choices(job, self.model, request_id, self.script)
        if request_id in self.running:
            raise InvalidRequest(f"A request with id {request_id!r} is running already.", param="request_id")
        self.running[request_id] = self.aborts
        self.seen.append((choices.prompt, job.params))
        try:
            await self._admit()
            while choices.live:
                await self._until(lambda: self.state.gate == "open" or self.running[request_id] or self.failure)
                if self.failure is not None:
                    raise self.failure
                await asyncio.sleep(self.token_delay_s)
                if self.breakage is not None and choices.num_steps == self.break_after:
                    raise self.breakage
                yield choices.step(aborts=self.running[request_id])
        finally:
            self.running.pop(request_id, None)
            if choices.live:
                self.aborted.append(request_id)
            await self._notify()

    async def _until(self, condition):
        async with self._changed:
            await self._changed.wait_for(condition)

    async def _admit(self):
        if not self.is_sleeping:
            return
        if self.config.on_sleeping_request == "reject":
            raise ModelSleeping
        if self.config.on_sleeping_request == "wake":
            self.on_auto_wake(await self.wake_up())
            return
        if self.held >= self.config.hold_queue_size:
            raise QueueFull("The queue of held requests is full.")
        self.held += 1
        try:
            async with asyncio.timeout(self.config.hold_timeout_s):
                await self._until(lambda: not self.is_sleeping)
        except TimeoutError:
            raise ModelSleeping from None
        finally:
            self.held -= 1

    # --- control --------------------------------------------------------------------------------

    async def control(self, call):
        if not self.config.enable_sleep_mode:
            raise SleepModeDisabled("Sleep mode is off.")
        if self.failure is not None:
            raise self.failure
        report = await self._carried_out(call)
        await self._notify()
        return report

    async def _carried_out(self, call):
        match call:
            case SleepCall():
                return await self._sleep(call)
            case WakeCall():
                self.state, report = woken(self.state, parse_tags(call.tags))
                return report
            case PauseCall():
                mode = await self._drain(call)
                self.state = gated(self.state, paused=True, refusing=mode != "keep")
            case ResumeCall():
                if self.is_sleeping:
                    raise TransitionConflict("Cannot resume while asleep; wake up first.")
                self.state = gated(self.state, paused=False, refusing=False)
            case ReloadCall():
                self.reloaded.append(call.path)
                return UpdateReport(updated=3, updated_bytes=NBYTES["weights"])
            case ResetPrefixCacheCall():
                self.prefix_resets += 1
            case RpcCall():
                check_rpc(call.method, call.args)
                return [{"residual_bytes": 77, "verify": {"verified_bytes": 5}}.get(call.method, [])]
            case _:
                content, report = written(self.state, call.path)
                self.updated.append((call.path, content))
                return report
        return None

    async def _sleep(self, call):
        level, tags = parse_level(call.level), parse_tags(call.tags)
        state, report = slept(self.state, level, tags) if level else (self.state, SleepReport(False, 0))
        if level == 0 or (report.changed and not self.is_sleeping):
            await self._drain(call)
        self.state = state
        return report

    async def _drain(self, call):
        mode = parse_mode(call.mode, self.config.default_sleep_mode)
        if mode == "abort":
            self.running = dict.fromkeys(self.running, True)
            await self._notify()
        if mode != "keep":
            try:
                async with asyncio.timeout(call.timeout_s or self.config.drain_timeout_s):
                    await self._until(lambda: not self.running)
            except TimeoutError:
                raise DrainTimeout("Drain timed out.") from None
        return mode
