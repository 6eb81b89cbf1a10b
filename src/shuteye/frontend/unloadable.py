"""An engine that can do without its process: unloaded, it is an image on disk, and what is known of its model here.

Knows nothing of when to unload; callers ask for it, as for a sleep.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TypeVar

from shuteye.calls import Call, SleepCall, UnloadCall, WakeCall
from shuteye.config import EngineConfig
from shuteye.errors import (
    InvalidRequest,
    ModelSleeping,
    QueueFull,
    RequestAborted,
    ShuteyeError,
    SleepModeDisabled,
    TransitionConflict,
    WakeFailed,
)
from shuteye.frontend.async_engine import AsyncEngine
from shuteye.frontend.engine import Engine, EngineView, ServedModel
from shuteye.frontend.mailbox import Backlog
from shuteye.memory.process_memory import private_bytes
from shuteye.state import TAGS, EngineState, SleepReport, TagReport, WakeReport
from shuteye.tasks.base import Job

R = TypeVar("R")
OutputT = TypeVar("OutputT")


@dataclass(frozen=True, slots=True)
class Unloaded:
    """What is left of an engine while it has no process."""

    view: EngineView
    model: ServedModel


class UnloadableEngine(Engine):
    """An engine whose process can be ended and forked again, with all that it has in memory.

    While it is unloaded it is asleep at level 2: its policy decides over requests, and `wake_up` loads it.

    Args:
        config: what to serve and how.
        open_engine: one for a config, not started. It is asked for another one at each load, for the config that the
            first has completed, so that the model keeps its limits.
    """

    def __init__(self, config: EngineConfig, open_engine: Callable[[EngineConfig], AsyncEngine]) -> None:
        self._open_engine = open_engine
        self._engine = self._open(config)
        self._unloaded: Unloaded | None = None
        self._moving = asyncio.Lock()  # held by whoever loads or unloads
        self._is_unloading = False
        self._loading: asyncio.Task[WakeReport] | None = None
        self._held: dict[object, asyncio.Future[None]] = {}  # requests that wait for somebody to load the model

    def _open(self, config: EngineConfig) -> AsyncEngine:
        engine = self._open_engine(config)
        engine.on_auto_wake = self._tell_auto_wake
        return engine

    def _tell_auto_wake(self, outcome: WakeReport | ShuteyeError) -> None:
        self.on_auto_wake(outcome)  # whoever listens now

    # --- life -----------------------------------------------------------------------------------

    async def start(self) -> None:
        """See `Engine.start`."""
        await self._engine.start()

    async def launch(self) -> None:
        """See `Engine.launch`."""
        await self._engine.launch()

    async def restart(self) -> None:
        """See `Engine.restart`."""
        if self._unloaded is not None:
            raise TransitionConflict("The model is unloaded and has no engine; wake_up loads it.")
        await self._engine.restart()

    async def close(self, reason: ShuteyeError | None = None) -> None:
        """See `Engine.close`."""
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.gather(self._loading, return_exceptions=True)
        await self._engine.close(reason)

    # --- what is known without asking -----------------------------------------------------------

    @property
    def view(self) -> EngineView:
        """See `Engine.view`."""
        return self._engine.view if self._unloaded is None else self._unloaded.view

    @property
    def model(self) -> ServedModel:
        """See `Engine.model`."""
        return self._engine.model if self._unloaded is None else self._unloaded.model

    @property
    def engine_pid(self) -> int | None:
        """The engine's process id; None if there is none."""
        return self._engine.engine_pid if self._unloaded is None else None

    # --- requests and calls ---------------------------------------------------------------------

    async def stream(
        self, job: Job[OutputT], *, request_id: str | None = None, backlog: Backlog | None = None
    ) -> AsyncGenerator[OutputT, None]:
        """See `Engine.stream`."""
        while self._is_unloading or self._unloaded is not None:
            await self._until_loaded(request_id)
        async with aclosing(self._engine.stream(job, request_id=request_id, backlog=backlog)) as outputs:
            async for output in outputs:
                yield output

    @property
    def request_ids(self) -> tuple[str, ...]:
        """See `Engine.request_ids`."""
        held = tuple(request_id for request_id in self._held if isinstance(request_id, str))
        return (*self._engine.request_ids, *held)

    async def abort(self, request_id: str) -> None:
        """See `Engine.abort`."""
        held = self._held.pop(request_id, None)
        if held is not None and not held.done():
            held.set_exception(RequestAborted("The request was ended while it waited for the model to be loaded."))
        await self._engine.abort(request_id)

    async def control(self, call: Call[R]) -> R:
        """See `Engine.control`; unloading and loading are this engine's own."""
        report: object
        if isinstance(call, UnloadCall):
            report = await self._unload(call)
        elif self._unloaded is None:
            report = await self._engine.control(call)
        else:
            report = await self._without_process(self._unloaded, call)
        return report  # type: ignore[return-value]  # each is its call's

    async def _without_process(self, unloaded: Unloaded, call: Call[object]) -> object:
        match call:
            case WakeCall(tags):
                if tags is not None and set(tags) != set(TAGS):
                    raise TransitionConflict("The model is unloaded: wake it up whole, without tags.")
                return await self.load()
            case SleepCall(level=2, tags=None):
                return SleepReport(changed=False, level=2)
            case SleepCall(level=level):
                raise TransitionConflict(f"Cannot sleep at level {level}: the model is unloaded; wake it up first.")
        raise TransitionConflict(f"Cannot {call.verb}: the model is unloaded; wake it up first.")

    # --- unloading ------------------------------------------------------------------------------

    async def _unload(self, call: UnloadCall) -> SleepReport:
        async with self._moving:
            if self._unloaded is not None:
                return SleepReport(changed=False, level=2)
            if not self._engine.config.enable_sleep_mode:
                raise SleepModeDisabled("Sleep mode is off; start the server with --enable-sleep-mode.")
            self._is_unloading = True  # whoever comes from now on waits for the end of this
            try:
                return await self._end_process(call)
            finally:
                self._is_unloading = False

    async def _end_process(self, call: UnloadCall) -> SleepReport:
        began = time.perf_counter()
        engine = self._engine
        mode = call.mode or engine.config.default_sleep_mode
        mode = "wait" if mode == "keep" else mode  # what is kept would end with the process
        asleep = await engine.control(SleepCall(2, mode, timeout_s=call.timeout_s))
        of_process = 0 if engine.engine_pid is None else private_bytes(engine.engine_pid)
        self._unloaded = _left_of(engine)
        await engine.close()
        return replace(
            asleep,
            changed=True,
            freed_bytes=asleep.freed_bytes + of_process,
            residual_bytes=0,
            seconds=time.perf_counter() - began,
        )

    async def lose(self) -> None:
        """The process has ended by itself: go on without one, as if unloaded. Its model must have been loaded."""
        async with self._moving:
            if self._unloaded is None and self._engine.status == "dead":
                self._unloaded = _left_of(self._engine)
                await self._engine.close()

    # --- loading --------------------------------------------------------------------------------

    async def load(self) -> WakeReport:
        """Fork a process that serves the model as before; whoever asks meanwhile waits for the same one.

        Raises:
            WakeFailed: the model stays unloaded, and may be loaded by another call.
        """
        if self._loading is None:
            self._loading = asyncio.create_task(self._load())
            self._loading.add_done_callback(self._on_loading_ended)
        return await asyncio.shield(self._loading)

    def _on_loading_ended(self, loading: asyncio.Task[WakeReport]) -> None:
        self._loading = None
        if not loading.cancelled():
            loading.exception()  # whoever waited has it

    async def _load(self) -> WakeReport:
        async with self._moving:
            unloaded = self._unloaded
            if unloaded is None:
                return WakeReport(changed=False)
            began = time.perf_counter()
            engine = self._open(unloaded.view.config)
            try:
                await engine.start()
            except BaseException as error:
                await engine.close()
                if not isinstance(error, ShuteyeError):
                    raise
                raise WakeFailed(f"The model could not be loaded again: {error.message}") from error
            self._engine, self._unloaded = engine, None
        self._release_held()
        return _as_wake(engine, time.perf_counter() - began)

    def _release_held(self) -> None:
        for held in self._held.values():
            if not held.done():
                held.set_result(None)
        self._held.clear()

    # --- requests that find no process ----------------------------------------------------------

    async def _until_loaded(self, request_id: str | None) -> None:
        """What the policy has in store for a request; returns once it may be worth another try.

        Raises:
            ModelSleeping: it is to be refused, or has waited for long enough.
            QueueFull: as many wait as may.
            RequestAborted: somebody has ended it.
            WakeFailed: the model could not be loaded.
        """
        if self._is_unloading:
            async with self._moving:
                return
        match self.config.on_sleeping_request:
            case "reject":
                raise ModelSleeping
            case "hold":
                await self._hold(object() if request_id is None else request_id)
            case "wake":
                await self._load_for_request()

    async def _hold(self, key: object) -> None:
        config = self.config
        if len(self._held) >= config.hold_queue_size:
            raise QueueFull(f"{config.hold_queue_size} requests are held already; try again once the model is awake.")
        if key in self._held:
            raise InvalidRequest(f"A request with id {key!r} is running already.", param="request_id")
        self._held[key] = held = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(config.hold_timeout_s):
                await held
        except TimeoutError:
            raise ModelSleeping from None
        finally:
            self._held.pop(key, None)

    async def _load_for_request(self) -> None:
        is_first = self._loading is None
        try:
            report = await self.load()
        except ShuteyeError as error:
            if is_first:
                self.on_auto_wake(error)
            raise
        if is_first:
            self.on_auto_wake(report)


def _left_of(engine: AsyncEngine) -> Unloaded:
    """What is known of an engine whose process is gone, or about to go: all memory given back, nothing in flight."""
    view = engine.view
    tags = tuple(
        replace(tag, residency="discarded", backing="image" if tag.tag == "weights" else None, resident_bytes=0)
        for tag in view.state.tags
    )
    state = EngineState(gate="closed", level=2, tags=tags)
    return Unloaded(replace(view, status="unloaded", failure=None, hang=None, state=state), engine.model)


def _as_wake(engine: AsyncEngine, seconds: float) -> WakeReport:
    """What a load did, in terms of a wake."""
    state, config = engine.state, engine.config
    tags = tuple(
        TagReport(tag.tag, tag.residency, tag.backing, restored_bytes=tag.resident_bytes, seconds=seconds)
        for tag in state.tags
    )
    verified = config.verify_wake != "off"
    return WakeReport(
        changed=True,
        tags=tags,
        restored_bytes=sum(tag.restored_bytes for tag in tags),
        verified="full" if verified else "off",
        verified_bytes=engine.info.weights_bytes if verified else 0,
        canary=config.canary,
        weights_source="image",
        seconds=seconds,
    )
