"""One replica: an engine, the HTTP application around it, and what has it follow the control. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Protocol

from fastapi import FastAPI

from shuteye.calls import Call, SleepCall, WakeCall
from shuteye.errors import EngineDead
from shuteye.frontend.engine import Engine
from shuteye.ray.control import ControlLink, Look
from shuteye.ray.follower import Follower
from shuteye.ray.idle import CountRequests, Work, sleep_when_idle
from shuteye.ray.proxy import LeaveRequestIds
from shuteye.ray.routes import CONTROL_PATHS, ROUTES, Fleet
from shuteye.ray.settings import ReplicaSettings
from shuteye.server.app import create_app
from shuteye.server.context import ServerContext
from shuteye.server.control import health
from shuteye.server.http.admission import refuse_unless_alive


class Link(ControlLink, Fleet, Protocol):
    """What a replica and its routes ask of the control."""


class Replica:
    """Loads the model, comes up as is wanted, and serves until it is stopped.

    Attributes:
        app: what answers HTTP requests; its lifespan is this object's, so that whoever runs it starts nothing.
    """

    def __init__(self, name: str, settings: ReplicaSettings, engine: Engine, link: Link) -> None:
        self._settings = settings
        self._engine = engine
        self._work = Work()
        self.app = create_app(engine, settings.server, engine_routes=ROUTES)
        self.app.add_middleware(CountRequests, work=self._work, except_paths=CONTROL_PATHS)
        self.app.add_middleware(LeaveRequestIds)
        self.app.state.fleet = link
        self._context: ServerContext = self.app.state.contexts.default
        self._lifespan = self.app.router.lifespan_context
        self.app.router.lifespan_context = _started_already
        self._follower = Follower(name, link, self._apply)
        self._running = contextlib.AsyncExitStack()

    async def start(self) -> None:
        """Return once the model is loaded and the replica is what is wanted.

        Raises:
            ShuteyeError: it cannot be.
        """
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self._lifespan(self.app))
            await self._loaded()
            stack.push_async_callback(self._follower.stop)
            await self._follower.start()
            if self._settings.idle_sleep_s is not None:
                self._watch_idleness(stack, self._settings.idle_sleep_s)
            self._running = stack.pop_all()

    async def _loaded(self) -> None:
        loading = self._context.loading
        while not (loading.done or loading.failed):
            await asyncio.sleep(0.05)
        if loading.failed:
            raise self._engine.failure or EngineDead("The model failed to load; the replica's log has more.")

    def _watch_idleness(self, stack: contextlib.AsyncExitStack, idle_s: float) -> None:
        call = SleepCall(self._settings.idle_sleep_level, mode="wait")
        watching = asyncio.create_task(sleep_when_idle(self._engine, self._work, idle_s, lambda: self._apply(call)))
        stack.callback(watching.cancel)

    async def _apply(self, call: Call[Any]) -> Any:
        if isinstance(call, Look):
            return (await health.state(self._context)).body
        report = await self._context.metrics.transition(call.verb, self._engine.control(call))
        if isinstance(call, WakeCall):
            self._work.note()
        return report

    def check(self) -> None:
        """Raise what should have this replica replaced.

        Raises:
            ShuteyeError: its engine is dead, hung or faulted, or it is not what is wanted.
        """
        refuse_unless_alive(self._engine)
        if self._follower.failure is not None:
            raise self._follower.failure

    async def stop(self) -> None:
        """End the engine; requests that still run fail."""
        self._context.stopping.begun = True
        await self._running.aclose()


@contextlib.asynccontextmanager
async def _started_already(_app: FastAPI) -> Any:
    yield
