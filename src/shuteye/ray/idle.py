"""Scale to zero by sleeping: counts requests, and puts an engine that has had none for a while to sleep."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from shuteye.errors import ShuteyeError
from shuteye.frontend.engine import Engine

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

logger = logging.getLogger(__name__)

LOOKS = 10
"""How often an idle time is looked at while it passes."""


class Work:
    """How many requests for the model are under way, and since when there has been none."""

    def __init__(self) -> None:
        self._count = 0
        self._ended_at = time.monotonic()

    def begin(self) -> None:
        """Another one has come."""
        self._count += 1

    def end(self) -> None:
        """One of them has been answered."""
        self._count -= 1
        self._ended_at = time.monotonic()

    def note(self) -> None:
        """Begin to wait anew, as after a wake."""
        self._ended_at = time.monotonic()

    @property
    def idle_s(self) -> float:
        """For how long there has been none; 0 while there is one."""
        return 0.0 if self._count else time.monotonic() - self._ended_at


class CountRequests:
    """ASGI middleware: POST requests are work, but for those of `except_paths`."""

    def __init__(self, app: ASGIApp, *, work: Work, except_paths: frozenset[str]) -> None:
        self.app = app
        self.work = work
        self.except_paths = except_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and count it until it is answered to the last byte."""
        if scope["type"] != "http" or scope["method"] != "POST" or self._is_control(scope):
            await self.app(scope, receive, send)
            return
        self.work.begin()
        try:
            await self.app(scope, receive, send)
        finally:
            self.work.end()

    def _is_control(self, scope: Scope) -> bool:
        return scope["path"].removeprefix(scope.get("root_path", "")) in self.except_paths


async def sleep_when_idle(engine: Engine, work: Work, idle_s: float, sleep: Callable[[], Awaitable[object]]) -> None:
    """Call `sleep` whenever `engine` could serve and has had nothing to do for `idle_s`; never returns."""
    while True:
        await asyncio.sleep(max(idle_s / LOOKS, 0.05))
        if engine.status != "ready" or engine.is_sleeping or engine.is_paused or engine.state.faulted is not None:
            work.note()
            continue
        if work.idle_s < idle_s:
            continue
        try:
            await sleep()
            logger.info("Asleep after %g s without a request; the next one wakes the model.", idle_s)
        except ShuteyeError as error:
            logger.warning("Idle, but cannot sleep: %s", error.message)
            work.note()
