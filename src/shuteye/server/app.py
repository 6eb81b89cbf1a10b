"""Builds the HTTP application around an engine: routes, errors, keys, limits, and the engine's start and end.

Knows nothing of sockets or signals, and keeps no globals; `server/run.py` serves what this makes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from shuteye import __version__
from shuteye.errors import ShuteyeError
from shuteye.server.auth import control_routes_exist
from shuteye.server.body_limit import BodyLimit
from shuteye.server.config import ServerConfig
from shuteye.server.context import ServerContext
from shuteye.server.engine_protocol import ServedEngine
from shuteye.server.errors import install_error_handlers
from shuteye.server.metrics import Metrics
from shuteye.server.routes import chat, completions, health, metrics, models, other_tasks, sleep, tokenize

logger = logging.getLogger(__name__)


def create_app(engine: ServedEngine, config: ServerConfig) -> FastAPI:
    """An application that starts `engine` in the background when it starts, and closes it when it ends.

    Control routes exist only if the engine has sleep mode on and there is an admin key or development mode.
    """
    app = FastAPI(title="shuteye", version=__version__, lifespan=_lifespan, redirect_slashes=False)
    model_name = (config.served_model_name or (engine.config.model,))[0]
    app.state.context = ServerContext(engine, config, Metrics(engine, model_name))
    app.add_middleware(BodyLimit, max_bytes=config.max_body_bytes)
    install_error_handlers(app)
    for module in (chat, completions, models, tokenize, health, metrics, other_tasks):
        app.include_router(module.router)
    app.include_router(health.keyed)
    if control_routes_exist(config, enable_sleep_mode=engine.config.enable_sleep_mode):
        app.include_router(sleep.router)
        _warn_of_open_control_routes(config)
    return app


def _warn_of_open_control_routes(config: ServerConfig) -> None:
    if config.admin_api_key is not None:
        return
    logger.warning(
        "Development mode: the control routes (/sleep, /wake_up, …) are open to every caller, without a key."
    )
    if not config.is_loopback:
        logger.warning(
            "DANGER: development mode on %s, which other machines can reach: anyone there can put this model to "
            "sleep. Use --admin-api-key, or listen on 127.0.0.1.",
            config.host,
        )


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    context: ServerContext = app.state.context
    starting = asyncio.create_task(_start(context))
    try:
        yield
    finally:
        await context.engine.close()
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)


async def _start(context: ServerContext) -> None:
    engine = context.engine
    began = time.perf_counter()
    try:
        await engine.start()
    except ShuteyeError as error:
        # the engine keeps its failure: every route answers with it, and `serve` stops because of it
        if engine.status != "closed":
            context.loading.failed = True
            logger.error("The model %r failed to load: %s", engine.config.model, error.message)  # noqa: TRY400
    except Exception:
        context.loading.failed = True
        logger.exception("The model %r failed to load because of a bug of ours.", engine.config.model)
        raise
    else:
        logger.info("The model %r is ready after %.1f s.", engine.config.model, time.perf_counter() - began)
