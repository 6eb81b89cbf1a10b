"""An engine without a model, for tests of the server: the seam's verbs over a fake model and a fake memory."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from fake_memory import NBYTES, gated, moved, slept, told, woken, written
from fake_model import Choices, byte_tokenizer, model_of, output_of

from shuteye import calls, errors
from shuteye.config import EngineConfig
from shuteye.engine.transitions import check_rpc, parse_level, parse_mode, parse_tags
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
        self.status, self.state, self.stats = (
            "starting",
            EngineState(),
            SchedulerStats(num_blocks=10, num_free_blocks=10),
        )
        self.running, self._changed = {}, asyncio.Condition()  # whether it is aborted, by request id
        self.aborted, self.seen, self.reloaded, self.updated = [], [], [], []
        self.held = self.prefix_resets = self.restarts = 0

    async def start(self):
        if self.start_gate is not None:
            await self.start_gate.wait()
        await asyncio.sleep(0)
        if isinstance(self.start_error, errors.ShuteyeError) and self.status != "closed":
            self.status, self.failure = "failed", self.start_error
        if error := self.failure or self.start_error:
            raise error
        self.status, self.state = "ready", moved(self.state, weights="resident", kv_cache="resident")

    async def close(self, reason=None):
        if self.status != "closed":
            self.status, self.failure = "closed", self.failure or reason or errors.EngineDead("The engine was closed.")
            if self.start_gate is not None:
                self.start_gate.set()
            await self._notify()

    async def restart(self):
        self.restarts += 1
        self.status, self.failure, self.hang = "starting", None, None
        await self.start()

    async def die(self):
        """As if the engine process had been killed."""
        self.status, self.failure = "dead", errors.EngineDead("The engine process ended (signal 9).")
        await self._notify()

    @property
    def view(self):
        return EngineView(self.config, self.status, self.failure, self.hang, self.state, self.stats)

    @property
    def model(self):
        if self.failure is not None:
            raise self.failure
        if self.status == "starting":
            raise errors.EngineNotReady("The model is still loading.")
        return model_of(self.config, self.task, self.tokenizer_, self.default_sampling)

    async def _notify(self):
        async with self._changed:
            self._changed.notify_all()

    @property
    def request_ids(self):
        return tuple(self.running)

    async def abort(self, request_id):
        if request_id in self.running:
            self.running[request_id] = True
            await self._notify()

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
            raise errors.InvalidRequest(f"A request with id {request_id!r} is running already.", param="request_id")
        self.running[request_id] = self.aborts
        self.seen.append((choices.prompt, job.params))
        try:
            await self._admit()
            while choices.live:
                await self._until(lambda: self.state.gate == "open" or self.running[request_id] or self.failure)
                await asyncio.sleep(self.token_delay_s)
                if self.breakage is not None and choices.num_steps == self.break_after:
                    raise self.breakage
                yield choices.step(aborts=self.running[request_id])
        finally:
            self.running.pop(request_id, None)
            if choices.live:
                self.aborted.append(request_id)
            await self._notify()

    async def _until(self, condition, timeout_s=None, error=None):
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(condition)
        except TimeoutError:
            raise error from None
        if self.failure is not None:
            raise self.failure

    async def _admit(self):
        if not self.is_sleeping:
            return
        if self.config.on_sleeping_request == "reject":
            raise errors.ModelSleeping
        if self.config.on_sleeping_request == "wake":
            self.on_auto_wake(await self.wake_up())
            return
        if self.held >= self.config.hold_queue_size:
            raise errors.QueueFull("The queue of held requests is full.")
        self.held += 1
        try:
            await self._until(lambda: not self.is_sleeping, self.config.hold_timeout_s, errors.ModelSleeping())
        finally:
            self.held -= 1

    async def control(self, call):
        if not self.config.enable_sleep_mode:
            raise errors.SleepModeDisabled("Sleep mode is off.")
        if self.failure is not None:
            raise self.failure
        report = None
        match call:
            case calls.SleepCall() | calls.UnloadCall():
                report = await self._sleep(call)
            case calls.WakeCall():
                self.state, report = woken(self.state, parse_tags(call.tags))
            case calls.PauseCall():
                mode = await self._drain(call)
                self.state = gated(self.state, paused=True, refusing=mode != "keep")
            case calls.ResumeCall():
                if self.is_sleeping:
                    raise errors.TransitionConflict("Cannot resume while asleep; wake up first.")
                self.state = gated(self.state, paused=False, refusing=False)
            case calls.ReloadCall():
                self.reloaded.append(call.path)
                report = UpdateReport(updated=3, updated_bytes=NBYTES["weights"])
            case calls.ResetPrefixCacheCall():
                self.prefix_resets += 1
            case calls.RpcCall(method="reload_weights"):
                check_rpc(call.method, call.args)
                report = [asdict(await self.control(calls.ReloadCall(*call.args)))]
            case calls.RpcCall():
                report = [told(call)]
            case _:
                content, report = written(self.state, call.path)
                self.updated.append((call.path, content))
        await self._notify()
        return report

    async def _sleep(self, call):
        if isinstance(call, calls.UnloadCall):
            call = calls.SleepCall(2, "wait" if call.mode == "keep" else call.mode, timeout_s=call.timeout_s)
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
            timeout_s = call.timeout_s or self.config.drain_timeout_s
            await self._until(lambda: not self.running, timeout_s, errors.DrainTimeout("Drain timed out."))
        return mode
