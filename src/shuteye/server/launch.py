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
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

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
    from shuteye.frontend.fleet_driver import FleetDriver
    from shuteye.frontend.zygote import Zygote
    from shuteye.server.serve_order import ServeOrder

logger = logging.getLogger(__name__)

STOPPED, FAILED, FORCED = 0, 1, 130
LOOK_S, RETRY_S = 0.1, 5.0


def serve(order: ServeOrder, zygote: Zygote | None = None, process: EngineProcess | None = None) -> int:
    """Serve models, each in an engine process of its own, until SIGINT or SIGTERM; returns the process's exit code.

    Args:
        zygote: of whom their processes are forked; kept alive here.
        process: one that is told to serve the first of them; see `AsyncEngine`.
    """
    begun = [process] if process is not None else []

    def open_engine(config: EngineConfig) -> AsyncEngine:
        return AsyncEngine(config, zygote=zygote, process=begun.pop() if begun else None)

    background = [] if zygote is None else [partial(keep_zygote, zygote)]
    if not order.is_fleet:
        return serve_engine(UnloadableEngine(order.engines[0], open_engine), order.server, background=background)
    from shuteye.server.fleet_models import fleet_of

    if begun:
        begun.pop().close()  # nobody has told it what to serve
    driver, engines = fleet_of(order.engines, order.fleet, open_engine)
    names = order.server.served_model_name
    configs = [replace(order.server, served_model_name=names[i : i + 1]) for i in range(len(engines))]
    first, *others = zip(engines, configs, strict=True)
    return serve_engine(*first, others=others, fleet=driver, background=[*background, driver.run])


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


async def keep_zygote(zygote: Zygote) -> None:
    """Start another whenever it has ended, so that the next model need not wait for it. Engines go on meanwhile."""
    while True:
        await asyncio.sleep(LOOK_S)
        if zygote.has_ended:
            logger.warning("The process that engines are forked from has ended; another is started.")
            try:
                zygote.replace()
            except OSError as error:
                logger.error("It could not be started: %s. It is tried again.", error)  # noqa: TRY400
                await asyncio.sleep(RETRY_S)


def serve_engine(
    engine: Engine,
    config: ServerConfig,
    *,
    others: Sequence[tuple[Engine, ServerConfig]] = (),
    fleet: FleetDriver | None = None,
    background: Sequence[Callable[[], Coroutine[Any, Any, None]]] = (),
) -> int:
    """Serve `engine`, which is started and closed here; returns the process's exit code.

    Args:
        others: further models, each with what the config says of it.
        fleet: who moves the models, if somebody does.
        background: what is to be done as long as it serves.
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
        from shuteye.server.app import ServedEngine
        from shuteye.server.run import serve_on

        logger.info("Listening on %s; GET /ready tells when the model is loaded.", address_of(listener, config))
        served = [ServedEngine(*other) for other in others]
        return serve_on(
            listener, engine, config, runner, noted=noted, others=served, fleet=fleet, background=background
        )


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
