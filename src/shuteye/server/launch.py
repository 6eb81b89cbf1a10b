"""Serves a model: the engine's process is started first, and what serves it is imported while it loads.

Exit codes: 0 stopped as asked, 1 could not listen or load or keep the engine alive, 130 forced
by a second signal.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import threading
from collections.abc import Iterator

import uvloop

from shuteye import logs
from shuteye import processes as descriptors
from shuteye.config import EngineConfig
from shuteye.errors import InvalidRequest
from shuteye.frontend.async_engine import AsyncEngine
from shuteye.frontend.engine import Engine
from shuteye.server.config import ServerConfig
from shuteye.server.listener import open_listener

logger = logging.getLogger(__name__)

STOPPED, FAILED, FORCED = 0, 1, 130


def serve(engine_config: EngineConfig, server_config: ServerConfig) -> int:
    """Serve a model in an engine process of its own until SIGINT or SIGTERM; returns the process's exit code."""
    return serve_engine(AsyncEngine(engine_config), server_config)


def serve_engine(engine: Engine, config: ServerConfig) -> int:
    """Serve `engine`, which is started and closed here; returns the process's exit code."""
    logs.configure(logs.LogSettings(config.log_format, config.log_level))
    descriptors.raise_limit()
    try:
        listener = open_listener(config)
    except InvalidRequest as error:
        from shuteye.server.app import with_flag

        logger.error("%s", with_flag(error))  # noqa: TRY400
        return FAILED
    with listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner, _noting_signals() as noted:
        runner.run(engine.launch())
        gc.disable()  # what is imported stays
        from shuteye.server.run import serve_on  # most of what this process imports

        gc.freeze()
        gc.enable()
        logger.info("Listening on %s; GET /ready tells when the model is loaded.", address_of(listener, config))
        return serve_on(listener, engine, config, runner, noted)


@contextlib.contextmanager
def _noting_signals() -> Iterator[list[signal.Signals]]:
    """Those that come before the server handles them, which then does, so that there is one way to stop."""
    noted: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    note = lambda number, _frame: noted.append(signal.Signals(number))  # noqa: E731
    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def address_of(listener: socket.socket, config: ServerConfig) -> str:
    """What a socket that listens is called in links."""
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"http://{host}:{listener.getsockname()[1]}"
