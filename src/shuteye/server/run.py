"""Serves an engine on a socket until a signal says stop: answers while the model loads, drains, closes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.lifespan.on import LifespanOn
from uvicorn.server import HANDLED_SIGNALS

from shuteye.errors import ServerStopping
from shuteye.frontend.engine import Engine
from shuteye.frontend.fleet_driver import FleetDriver
from shuteye.server.app import ServedEngine, create_app, with_flag
from shuteye.server.config import ServerConfig
from shuteye.server.connections import Acceptor, Connection
from shuteye.server.context import contexts_of
from shuteye.server.control.supervisor import Supervisor
from shuteye.server.launch import FAILED, FORCED, STOPPED, address_of

logger = logging.getLogger(__name__)

LAST_ANSWERS_S = 2.0
"""After the grace, how long clients have to take the errors that end their requests."""
UVICORN_LATER_S = 1.0
"""After that, how long they have to end by themselves once cut off; then uvicorn cancels them."""
Background = Callable[[], Coroutine[Any, Any, None]]
POLLED_PATHS = ("/health", "/ready", "/ping", "/metrics")


def serve_on(
    listener: socket.socket,
    engine: Engine,
    config: ServerConfig,
    runner: asyncio.Runner,
    *,
    noted: Sequence[signal.Signals] = (),
    others: Sequence[ServedEngine] = (),
    fleet: FleetDriver | None = None,
    background: Sequence[Background] = (),
) -> int:
    """Serve `engine`, which is started and closed here, on a socket that listens; returns the process's exit code.

    Args:
        others, fleet: see `create_app`.
        background: what is to be done as long as it serves.
        noted: signals that came before; until they are handled here, whoever notes them may add to it.
    """
    logging.getLogger("uvicorn.access").addFilter(_worth_logging)
    server = _Server(create_app(engine, config, others=others, fleet=fleet), config, noted, background)
    runner.run(server.serve_until_stopped(listener))
    if server.exit_code == FAILED:
        _log_cause(engine, was_loaded=server.context.loading.done)
    return server.exit_code


def _worth_logging(record: logging.LogRecord) -> bool:
    """False for what probes and scrapers request every second."""
    message = record.getMessage()
    return not any(f'"{method} {path} ' in message for method in ("GET", "HEAD") for path in POLLED_PATHS)


def _log_cause(engine: Engine, *, was_loaded: bool) -> None:
    """Log last what ended the server, for readers of the end of the log."""
    if engine.failure is not None:
        what = "could not be kept alive" if was_loaded else "failed to load"
        logger.error("Stopped, because the model %r %s: %s", engine.config.model, what, with_flag(engine.failure))


class _Server(uvicorn.Server):
    """uvicorn's server, which also stops when the model cannot be loaded or kept alive, and leaves exit codes to us.

    After the first signal it goes on listening, so that probes and clients get an answer that says so instead of a
    refused connection; it ends once nothing is being answered any more, or when the grace is over.
    """

    def __init__(
        self,
        app: FastAPI,
        config: ServerConfig,
        noted: Sequence[signal.Signals] = (),
        background: Sequence[Background] = (),
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                loop="uvloop",
                http="h11",
                ws="none",
                lifespan="on",
                log_config=None,
                server_header=False,
                h11_max_incomplete_event_size=2 * config.max_header_bytes,  # the app refuses earlier, and says why
            )
        )
        self._engines = [context.engine for context in contexts_of(app)]
        self._config = config
        self._acceptor: Acceptor | None = None
        self.context = contexts_of(app).default
        self.context.stopping.begin = self._begin_to_stop
        self._supervisor = Supervisor(self.context)
        self._noted = noted
        self._background = background
        self._failed = False
        self._grace_ends: float | None = None  # monotonic seconds; from the first signal on
        self._waited_enough = asyncio.Event()

    @property
    def exit_code(self) -> int:
        """What the process should exit with, once the server has stopped."""
        if self._failed:
            return FAILED
        return FORCED if self.force_exit else STOPPED

    async def serve_until_stopped(self, listener: socket.socket) -> None:
        """Serve; whatever ends it, the engine is closed."""
        if self._config.uds is None:
            self.context.listening.url = address_of(listener, self._config)
        watching = [asyncio.create_task(work()) for work in (self._supervisor.watch, *self._background)]
        try:
            await self.serve(sockets=[listener])
        finally:
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)
            for engine in self._engines:
                await engine.close()

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; True ends the server."""
        self._failed = self.context.loading.failed or self._supervisor.gave_up
        drained = self._grace_ends is not None and (not self.server_state.tasks or self._grace_left_s <= 0)
        return self._failed or drained or await super().on_tick(counter)

    @property
    def _grace_left_s(self) -> float:
        if self._grace_ends is None:
            return self._config.shutdown_grace_s
        return max(0.0, self._grace_ends - time.monotonic())

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, but connections are accepted by ours, which knows when there is no room for more."""
        await super().startup(sockets=[])
        [listener] = sockets or []
        self._acceptor = Acceptor(listener, self._new_connection, num_open=lambda: len(self.server_state.connections))

    def _new_connection(self) -> Connection:
        return Connection(
            self.config, self.server_state, self.lifespan.state, header_timeout_s=self._config.header_timeout_s
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, but answers requests that outlast the grace, and shuts the app down even when forced."""
        self.context.stopping.begun = True
        if self._acceptor is not None:
            self._acceptor.close()
        self.config.timeout_graceful_shutdown = math.ceil(self._grace_left_s + LAST_ANSWERS_S + UVICORN_LATER_S)
        ending = asyncio.create_task(self._end_after_grace())
        await super().shutdown(sockets)
        self._waited_enough.set()
        await ending
        if isinstance(self.lifespan, LifespanOn) and not self.lifespan.shutdown_event.is_set():
            await self.lifespan.shutdown()

    async def _end_after_grace(self) -> None:
        """Close the engine, which answers its requests with an error; abort connections that do not take it in time."""
        await self._wait_at_most(self._grace_left_s)
        self.context.bodies.give_up()
        stopped = ServerStopping(
            "The server was stopped before this request was finished; send it again to another one."
        )
        closing = asyncio.gather(*(engine.close(stopped) for engine in self._engines))
        await self._wait_at_most(LAST_ANSWERS_S)
        if not self._waited_enough.is_set():
            for connection in list(self.server_state.connections):
                connection.transport.abort()
        await closing

    async def _wait_at_most(self, seconds: float) -> None:
        """Return when nothing is left to wait for, or when the time is over."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._waited_enough.wait(), seconds)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, a second one of either kind does not wait."""
        if self._grace_ends is not None:
            logger.warning("Second signal: stopping without waiting for running requests.")
            self.should_exit = self.force_exit = True
            self._waited_enough.set()
            return
        self._begin_to_stop(signal.Signals(sig).name)

    def _begin_to_stop(self, who: str) -> None:
        """Take no new requests, and end once those that run have, or when the grace is over."""
        logger.info(
            "%s: no new requests are taken; running ones have %g seconds. Another signal stops at once.",
            who,
            self._config.shutdown_grace_s,
        )
        self.context.stopping.begun = True
        self._grace_ends = time.monotonic() + self._config.shutdown_grace_s

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but does not raise the signal again afterwards: a server stopped as asked exits with 0."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self.handle_exit) for number in HANDLED_SIGNALS}
        for number in self._noted:
            self.handle_exit(number, None)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
