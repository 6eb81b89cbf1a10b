"""A model of a fleet, as its callers see it: an engine that is awake when a request runs, as the fleet sees to that.

What is decided about it is decided elsewhere (`fleet_driver.py`); this tells what happens, and moves it when told.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TypeVar, cast

import msgspec

from shuteye.calls import (
    Call,
    PauseCall,
    ReloadCall,
    ResumeCall,
    SleepCall,
    UnloadCall,
    UpdateCall,
    UpdateFromFileCall,
    WakeCall,
)
from shuteye.config import EngineConfig
from shuteye.errors import EngineDead, ShuteyeError, TransitionConflict
from shuteye.fleet import events
from shuteye.fleet.model_spec import Depth, ModelSpec, SleepOwner
from shuteye.fleet.phases import Phase
from shuteye.fleet.status import ModelStatus
from shuteye.frontend.engine import Engine, EngineView, ServedModel
from shuteye.frontend.fleet_driver import FleetDriver
from shuteye.frontend.mailbox import Backlog
from shuteye.frontend.unloadable import UnloadableEngine
from shuteye.memory.process_memory import bytes_below_peak, private_bytes
from shuteye.models.sources import resolve_source
from shuteye.state import SleepReport, WakeReport
from shuteye.tasks.base import Job

R = TypeVar("R")
OutputT = TypeVar("OutputT")

DEPTHS = {1: Depth.LEVEL_1, 2: Depth.LEVEL_2}
PROCESS_BYTES = 32 << 20
"""What an engine's process should have for itself while its model sleeps."""
UNKNOWN_BYTES = 1 << 30
"""What a model is thought to take of which nothing is known, as it has yet to be fetched."""
START_S = 7 * 24 * 3600.0
"""How long a model may take until it was loaded for the first time: its image may have to be made of gigabytes."""


@dataclass(slots=True)
class _AskedSleep:
    """An operator's sleep that the fleet has still to begin."""

    call: SleepCall | UnloadCall
    report: asyncio.Future[SleepReport]


class FleetEngine(Engine):
    """One model of a fleet.

    Args:
        spec: what the scheduler is told of it until it was loaded.
        engine: not started; its calls are this one's from now on.
    """

    def __init__(self, spec: ModelSpec, engine: UnloadableEngine, driver: FleetDriver) -> None:
        self._spec = self._loaded_spec = spec
        self._engine = engine
        self._driver = driver
        self._started = False
        self._asked: _AskedSleep | None = None
        self._wake_call: WakeCall | None = None  # an operator's, that the fleet has still to begin
        self._woken = WakeReport(changed=False)
        self._losing: asyncio.Task[None] | None = None
        self._process_bytes = PROCESS_BYTES
        engine.on_auto_wake = self._tell_auto_wake
        driver.add(spec, self)

    def _tell_auto_wake(self, outcome: WakeReport | ShuteyeError) -> None:
        self.on_auto_wake(outcome)

    # --- life -----------------------------------------------------------------------------------

    async def start(self) -> None:
        """See `Engine.start`."""
        await self._driver.wake(self._spec.name, within_s=START_S)

    async def restart(self) -> None:
        """See `Engine.restart`."""
        raise TransitionConflict("A model of a fleet is started by its next request, or by wake_up.")

    async def close(self, reason: ShuteyeError | None = None) -> None:
        """See `Engine.close`; the fleet ends with its first model that is closed."""
        self._driver.close()
        await self._engine.close(reason)

    # --- what is known without asking -----------------------------------------------------------

    @property
    def view(self) -> EngineView:
        """See `Engine.view`; the policy is the one that holds for whoever put the model to sleep."""
        self._notice_loss()
        view = self._engine.view
        if self._losing is not None:
            return replace(view, status="unloaded", failure=None, hang=None)
        if not self._started or self._status.owner in (SleepOwner.OPERATOR, SleepOwner.LEASE):
            return view
        return replace(view, config=replace(view.config, on_sleeping_request="wake"))

    @property
    def model(self) -> ServedModel:
        """See `Engine.model`."""
        return self._engine.model

    @property
    def engine_pid(self) -> int | None:
        """The engine's process id; None if there is none."""
        return self._engine.engine_pid

    @property
    def _status(self) -> ModelStatus:
        return self._driver.status(self._spec.name)

    def _notice_loss(self) -> None:
        """A process that has ended by itself is told of at once, whoever looks first."""
        if self._started and self._losing is None and self._engine.status == "dead":
            self._losing = asyncio.get_running_loop().create_task(self._engine.lose())
            self._losing.add_done_callback(self._on_lost)

    def _on_lost(self, _losing: asyncio.Task[None]) -> None:
        self._losing = None
        self._driver.lose(self._spec.name)

    # --- requests -------------------------------------------------------------------------------

    async def stream(
        self, job: Job[OutputT], *, request_id: str | None = None, backlog: Backlog | None = None
    ) -> AsyncGenerator[OutputT, None]:
        """See `Engine.stream`; the model is awake before it begins, and until it ends.

        A job whose process ends before the first output is carried out once more, by another one.
        """
        has_output, may_repeat = False, True
        while True:
            await self._be_found()
            try:
                async with (
                    self._driver.place(self._spec.name, within_s=self._engine.config.hold_timeout_s),
                    aclosing(self._engine.stream(job, request_id=request_id, backlog=backlog)) as outputs,
                ):
                    async for output in outputs:
                        has_output = True
                        yield output
            except EngineDead:
                if has_output or not may_repeat or self._engine.status == "closed":
                    raise
                may_repeat = False
            else:
                return

    async def _be_found(self) -> None:
        """Return once a process that has ended by itself is known to have."""
        self._notice_loss()
        if self._losing is not None:
            await asyncio.wait([self._losing])

    @property
    def request_ids(self) -> tuple[str, ...]:
        """See `Engine.request_ids`."""
        return self._engine.request_ids

    async def abort(self, request_id: str) -> None:
        """See `Engine.abort`."""
        await self._engine.abort(request_id)

    # --- calls ----------------------------------------------------------------------------------

    async def control(self, call: Call[R]) -> R:
        """See `Engine.control`; who asks here is an operator."""
        report: object
        if isinstance(call, UnloadCall):
            report = await self._sleep(call, Depth.UNLOADED)
        elif isinstance(call, SleepCall) and call.tags is None and call.level in DEPTHS:
            report = await self._sleep(call, DEPTHS[call.level])
        elif isinstance(call, WakeCall) and self._status.phase is not Phase.AWAKE:
            report = await self._wake(call)
        else:
            report = await self._engine.control(call)
            self._tell_of(call)
        return cast(R, report)

    async def _sleep(self, call: SleepCall | UnloadCall, depth: Depth) -> SleepReport:
        if self._asked is not None:
            raise TransitionConflict("The model is about to be put to sleep by another call.")
        self._asked = asked = _AskedSleep(call, asyncio.get_running_loop().create_future())
        try:
            self._driver.tell(events.SleepAsked(self._spec.name, depth))
            self.on_moved()  # it may be that deep already
            return await asked.report
        finally:
            self._asked = None if self._asked is asked else self._asked

    async def _wake(self, call: WakeCall) -> WakeReport:
        self._wake_call = call
        await self._driver.wake(self._spec.name, within_s=self._engine.config.hold_timeout_s)
        self._tell_of(call)
        return self._woken

    def _tell_of(self, call: Call[object]) -> None:
        """What a call has changed that the fleet must know."""
        name, state = self._spec.name, self._engine.state
        match call:
            case PauseCall() | ResumeCall() | SleepCall(level=0):
                self._driver.tell(events.PauseChanged(name, state.paused, refuses=state.refusing))
            case SleepCall() | WakeCall():  # of some tags, as trainers do it
                self._driver.tell(events.PauseChanged(name, state.paused, refuses=state.refusing))
                self._driver.tell(events.WeightSessionChanged(name, state.is_sleeping))
            case UpdateFromFileCall() | UpdateCall():
                self._driver.tell(events.WeightsUpdated(name, updated=True))
            case ReloadCall(path):
                self._driver.tell(events.WeightsUpdated(name, updated=path is not None))

    # --- what the fleet has it do (`DrivenModel`) -----------------------------------------------

    async def go_awake(self) -> None:
        """See `DrivenModel.go_awake`."""
        asked, self._wake_call = self._wake_call, None
        if not self._started:
            await self._engine.start()
            self._started = True
            # what is known now: by how much its KV cache may grow
            self._loaded_spec = msgspec.structs.replace(
                self._spec, growth_bytes=self._engine.config.kv_cache_memory or 0
            )
            self._driver.tell(events.ModelChanged(self._loaded_spec))
            return
        self._woken = await self._engine.control(asked or WakeCall())
        if asked is None:
            self.on_auto_wake(self._woken)

    async def go_to_sleep(self, depth: Depth) -> None:
        """See `DrivenModel.go_to_sleep`."""
        asked, self._asked = self._asked, None
        call = asked.call if asked is not None else _sleep_call(depth)
        try:
            report = await self._engine.control(call)
        except BaseException as error:
            self._notice_loss()  # it holds nothing any more, and others may wait for what it had
            if asked is not None and not asked.report.done():
                asked.report.set_exception(error)
            raise
        if asked is not None and not asked.report.done():
            asked.report.set_result(report)

    async def resident_bytes(self) -> int:
        """See `DrivenModel.resident_bytes`."""
        self._notice_loss()
        pid = self._engine.engine_pid
        found = 0 if pid is None else await asyncio.to_thread(private_bytes, pid)
        if pid is not None:
            self._process_bytes = max(0, found - self._tags_bytes())
            self._reserve(bytes_below_peak(pid))
        return found

    def _reserve(self, below_peak: int) -> None:
        """Have so much reserved for the awake model as it has taken beyond what it takes now, to compute."""
        is_awake = self._started and self._status.phase is Phase.AWAKE and not self._engine.is_sleeping
        if is_awake and below_peak > self._loaded_spec.growth_bytes:
            self._loaded_spec = msgspec.structs.replace(self._loaded_spec, growth_bytes=below_peak)
            self._driver.tell(events.ModelChanged(self._loaded_spec))

    def woken_bytes(self) -> int:
        """See `DrivenModel.woken_bytes`: what the engine found of its memory, and its process as it last was."""
        return self._tags_bytes() + self._process_bytes

    def _tags_bytes(self) -> int:
        return sum(tag.resident_bytes for tag in self._engine.state.tags)

    def on_moved(self) -> None:
        """See `DrivenModel.on_moved`."""
        status, asked = self._status, self._asked
        if asked is not None and not status.phase.in_transition and not asked.report.done():
            asked.report.set_result(SleepReport(changed=False, level=min(status.depth, 2)))


def estimated_bytes(config: EngineConfig) -> int:
    """What a model should take before it was ever loaded: its files and a small process; a guess without them."""
    try:
        source = resolve_source(config.model, revision=config.revision, cache_dir=config.cache_dir, offline=True)
    except ShuteyeError:
        return UNKNOWN_BYTES
    files = [source.path] if source.path.is_file() else [path for path in source.path.iterdir() if path.is_file()]
    return sum(path.stat().st_size for path in files) + PROCESS_BYTES


def _sleep_call(depth: Depth) -> SleepCall | UnloadCall:
    """A sleep that the fleet wants by itself: nothing runs, and whatever comes meanwhile is not lost."""
    return UnloadCall("wait") if depth is Depth.UNLOADED else SleepCall(depth.value, "keep")
