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
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import uvloop

from shuteye import logs
from shuteye import processes as descriptors
from shuteye.config import EngineConfig
from shuteye.errors import InvalidRequest
from shuteye.frontend.async_engine import AsyncEngine
from shuteye.frontend.engine import Engine
from shuteye.frontend.unloadable import UnloadableEngine
from shuteye.server.config import ServerConfig
from shuteye.server.listener import close_listener, open_listener

if TYPE_CHECKING:
    from shuteye.frontend.engine_process import EngineProcess
    from shuteye.frontend.zygote import Zygote

logger = logging.getLogger(__name__)

STOPPED, FAILED, FORCED = 0, 1, 130


def serve(
    engine_config: EngineConfig,
    server_config: ServerConfig,
    zygote: Zygote | None = None,
    process: EngineProcess | None = None,
) -> int:
    """Serve a model in an engine process of its own until SIGINT or SIGTERM; returns the process's exit code.

    Args:
        zygote, process: see `AsyncEngine`.
    """
    first = [process] if process is not None else []

    def open_engine(config: EngineConfig) -> AsyncEngine:
        return AsyncEngine(config, zygote=zygote, process=first.pop() if first else None)

    return serve_engine(UnloadableEngine(engine_config, open_engine), server_config, zygote)


def import_server() -> None:
    """Import what serves, which is most of what this process imports."""
    gc.disable()  # what is imported stays
    with _without_old_pydantic():
        _import_fastapi()
        import shuteye.server.run  # noqa: F401

    gc.freeze()
    gc.enable()


def _import_fastapi() -> None:
    """Have pydantic build what checks and writes FastAPI's own models when that is first done.

    They are those of an OpenAPI document, which few ask for, and to build them takes a tenth of a start.
    """
    import pydantic

    config = pydantic.BaseModel.model_config
    config["defer_build"] = True
    try:
        import fastapi  # noqa: F401
    finally:
        del config["defer_build"]


@contextlib.contextmanager
def _without_old_pydantic() -> Iterator[None]:
    """FastAPI asks of every type whether it is one of pydantic 1, whose copy it imports for that: it then need not."""
    name = "pydantic.v1"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # which raises ImportError (import system, 5.3.1)
    try:
        yield
    finally:
        del sys.modules[name]


def serve_engine(engine: Engine, config: ServerConfig, zygote: Zygote | None = None) -> int:
    """Serve `engine`, which is started and closed here; returns the process's exit code.

    Args:
        zygote: of whom its processes are forked; kept alive.
    """
    logs.configure(logs.LogSettings(config.log_format, config.log_level))
    descriptors.raise_limit()
    try:
        listener = open_listener(config)
    except InvalidRequest as error:
        from shuteye.server.app import with_flag

        logger.error("%s", with_flag(error))  # noqa: TRY400
        return FAILED
    with (
        _closing(listener, config),
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        _noting_signals() as noted,
    ):
        runner.run(engine.launch())
        import_server()
        from shuteye.server.run import serve_on

        logger.info("Listening on %s; GET /ready tells when the model is loaded.", address_of(listener, config))
        return serve_on(listener, engine, config, runner, noted=noted, zygote=zygote)


@contextlib.contextmanager
def _closing(listener: socket.socket, config: ServerConfig) -> Iterator[None]:
    try:
        yield
    finally:
        close_listener(listener, config)


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
    """What a socket that listens is called in links; of a Unix domain socket its path."""
    if config.uds is not None:
        return f"unix:{config.uds}"
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"http://{host}:{listener.getsockname()[1]}"
