"""Builds the HTTP application around an engine: routes, errors, keys, limits, the engine's start and end, and notices.

Keeps no globals; `server/run.py` serves what this makes, on sockets and until signals that this knows nothing of.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from fastapi import APIRouter, FastAPI
from starlette.middleware.cors import CORSMiddleware

from shuteye import __version__
from shuteye.config import EngineConfig
from shuteye.errors import InvalidRequest, ShuteyeError
from shuteye.frontend.engine import Engine
from shuteye.logs import is_for_a_terminal
from shuteye.server.anthropic import messages
from shuteye.server.anthropic.errors import PREFIX, anthropic_error
from shuteye.server.banner import banner
from shuteye.server.config import ServerConfig
from shuteye.server.context import CHOSEN, Contexts, ServerContext, contexts_of
from shuteye.server.control import fleet as fleet_routes
from shuteye.server.control import health, operations, routes
from shuteye.server.http import docs_page
from shuteye.server.http.encoded_bodies import EncodedBodies
from shuteye.server.http.errors import install_error_handlers
from shuteye.server.http.ignored_fields import IgnoredFields
from shuteye.server.http.middleware import (
    BodyDeadline,
    BodyFraming,
    BodyLimit,
    HeaderLimit,
    HeadRequests,
    RequestIds,
    RequestTargets,
)
from shuteye.server.openai import (
    chat,
    classify,
    cohere,
    completions,
    embeddings,
    invocations,
    models,
    render,
    responses,
    scores,
    transcriptions,
)
from shuteye.server.openapi import install_openapi
from shuteye.server.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from starlette.types import Scope

    from shuteye.frontend.fleet_driver import FleetDriver
    from shuteye.server.telemetry.tracing import Tracer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineRoutes:
    """The routes that act on the engine as a whole, or tell of it; where there are several engines, on all of them.

    Attributes:
        state: behind the inference key.
        control: there is an admin key or development mode, and sleep mode is on.
        restart: there is an admin key or development mode.
        operations: so with these.
    """

    state: APIRouter
    control: APIRouter
    restart: APIRouter
    operations: APIRouter | None = None


_SHAPES = {PREFIX: anthropic_error}

ONE_ENGINE = EngineRoutes(health.keyed, routes.router, routes.restarting, operations.router)


@dataclass(frozen=True, slots=True)
class ServedEngine:
    """One of several models of an app.

    Attributes:
        config: of the server, with what it says of this model alone: its names and how it writes tool calls and
            reasoning. All else is taken from the first model's.
    """

    engine: Engine
    config: ServerConfig


def create_app(
    engine: Engine,
    config: ServerConfig,
    *,
    others: Sequence[ServedEngine] = (),
    fleet: FleetDriver | None = None,
    tracer: Tracer | None = None,
    engine_routes: EngineRoutes = ONE_ENGINE,
) -> FastAPI:
    """An application that starts `engine` in the background when it starts, and closes it when it ends.

    Control routes exist only if there is an admin key or development mode; all of them but `/restart_engine` only if
    the engine has sleep mode on, too.

    Args:
        others: further models, which requests choose by name.
        fleet: who moves the models, if somebody does.
        tracer: used in place of the one that the config asks for.
        engine_routes: in place of those that act on the engine of the chosen model alone.

    Raises:
        InvalidRequest: the config asks for spans, and OpenTelemetry is not installed; or two models have one name.
    """
    app = FastAPI(
        title="shuteye",
        version=__version__,
        lifespan=_lifespan,
        redirect_slashes=False,
        docs_url=None,  # FastAPI's own pages fetch scripts from elsewhere
        redoc_url=None,
    )
    tracer = tracer or _configured_tracer(config, name_of(engine, config))
    first = _context(ServedEngine(engine, config), tracer)
    app.state.contexts = Contexts(
        [
            first,
            *(
                replace(_context(one, tracer), stopping=first.stopping, listening=first.listening, audio=first.audio)
                for one in others
            ),
        ]
    )
    _add_middleware(app, first)
    install_error_handlers(app, _SHAPES)
    install_openapi(app)
    for module in (chat, completions, responses, embeddings, scores, classify, cohere, transcriptions, invocations):
        app.include_router(module.router)
    app.include_router(messages.router)
    app.include_router(messages.without_weights)
    for module in (models, render, health, docs_page):
        app.include_router(module.router)
    app.include_router(health.measured)
    app.include_router(engine_routes.state)
    if fleet is not None:
        app.state.fleet_driver = fleet
        app.include_router(fleet_routes.router)
        if config.has_control_routes:
            app.include_router(fleet_routes.leases)
    if config.has_control_routes:
        app.include_router(engine_routes.restart)
        if engine_routes.operations is not None:
            app.include_router(engine_routes.operations)
        if engine.config.enable_sleep_mode:
            app.include_router(engine_routes.control)
    log_notices(engine.config, config)
    return app


def name_of(engine: Engine, config: ServerConfig) -> str:
    """What a model is called where it has one name."""
    return (config.served_model_name or (engine.config.model,))[0]


def _context(served: ServedEngine, tracer: Tracer | None) -> ServerContext:
    engine, config = served.engine, served.config
    metrics = Metrics(
        engine,
        name_of(engine, config),
        tracer=tracer,
        log_requests=config.log_requests,
        names=config.metrics_prefix,
    )
    engine.on_auto_wake = metrics.on_auto_wake
    return ServerContext(engine, config, metrics, tracer)


def _configured_tracer(config: ServerConfig, model_name: str) -> Tracer | None:
    if config.otlp_traces_endpoint is None:
        return None
    try:
        from shuteye.server.telemetry.tracing import otlp_tracer

        return otlp_tracer(config.otlp_traces_endpoint, model_name)
    except ImportError as error:
        raise InvalidRequest(
            f"otlp_traces_endpoint needs OpenTelemetry ({error}); install shuteye with its extra: shuteye[otel].",
            param="otlp_traces_endpoint",
        ) from error


def _add_middleware(app: FastAPI, context: ServerContext) -> None:
    """Add them from the inside out: a request passes through the last one first."""
    config = context.config
    app.add_middleware(BodyLimit, max_bytes=config.max_body_bytes, except_paths=frozenset({routes.UPDATE_PATH}))
    app.add_middleware(EncodedBodies, max_bytes=config.max_json_bytes, shapes=_SHAPES)
    app.add_middleware(BodyDeadline, timeout_s=config.body_timeout_s, pending=context.bodies)
    if context.tracer is not None:
        from shuteye.server.telemetry.tracing import TraceRequests

        app.add_middleware(TraceRequests, tracer=context.tracer)
    if not config.strict_fields:
        app.add_middleware(IgnoredFields)
    app.add_middleware(BodyFraming, shapes=_SHAPES)
    app.add_middleware(
        HeaderLimit, max_count=config.max_header_count, max_bytes=config.max_header_bytes, shapes=_SHAPES
    )
    app.add_middleware(RequestIds, on_answer=partial(_count_answer, context))
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allowed_origins,
            allow_methods=config.allowed_methods,
            allow_headers=config.allowed_headers,
            allow_credentials=config.allow_credentials,
            expose_headers=("X-Request-Id", "X-Ignored-Fields", "Retry-After"),
        )
    app.add_middleware(HeadRequests)  # before whatever counts answers by the route's method
    app.add_middleware(RequestTargets, prefix=config.root_path)


def _count_answer(default: ServerContext, scope: Scope, status: int) -> None:
    scope.get(CHOSEN, default).metrics.count_answer(scope, status)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    contexts = contexts_of(app)
    starting = asyncio.create_task(_start_all(contexts))
    try:
        yield
    finally:
        await asyncio.gather(*(context.engine.close() for context in contexts))
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        tracer = contexts.default.tracer
        if tracer is not None:
            await asyncio.to_thread(tracer.close)


async def _start_all(contexts: Contexts) -> None:
    """One after the other: whoever makes an image takes all cores, and much memory."""
    for context in contexts:
        await _start(context)


async def _start(context: ServerContext) -> None:
    engine = context.engine
    began = time.perf_counter()
    try:
        await engine.start()
    except ShuteyeError as error:
        # the engine keeps its failure: every route answers with it, and `serve` stops because of it
        if engine.status != "closed" and not context.stopping.begun:  # a stop may close the engine, too
            context.loading.failed = True
            logger.error("The model %r failed to load: %s", engine.config.model, with_flag(error))  # noqa: TRY400
    except Exception:
        context.loading.failed = True
        logger.exception("The model %r failed to load because of a bug of ours.", engine.config.model)
        raise
    else:
        context.loading.done = True
        _announce(context, time.perf_counter() - began)


# --- what an operator should know ---------------------------------------------------------------


def _announce(context: ServerContext, seconds: float) -> None:
    """Log that the model is loaded, which took so many seconds."""
    if is_for_a_terminal() and context.listening.url:
        logger.info("%s", banner(context, seconds))
    else:
        info = context.engine.info
        held = "; ".join(part for part in (info.weights_are, info.kv_cache_is) if part)
        logger.info("The model %r is ready after %.1f s: %s.", context.engine.config.model, seconds, held)


def log_notices(engine: EngineConfig, server: ServerConfig) -> None:
    """One line for each setting that does less, or more, than its name suggests."""
    if engine.memory_backend == "fake":
        logger.warning(
            "--memory-backend fake is a stand-in for tests, not for serving: it fills all memory that it takes with a "
            "pattern, the whole KV cache at once, so that it costs more than it has to."
        )
    if engine.dtype == "float16":
        logger.warning(
            "--dtype float16: weights and what is computed are bfloat16, which takes as many bytes and has three bits "
            "less of a float16 checkpoint's precision; --dtype float32 keeps them all."
        )
    if engine.enable_sleep_mode and not server.has_control_routes:
        logger.warning(
            "--enable-sleep-mode without --admin-api-key: the control routes (/sleep, /wake_up, …) do not exist, and "
            "nobody can put this model to sleep. Give a key, or --dev-mode to do without one."
        )
    if server.admin_api_key is not None and not engine.enable_sleep_mode:
        logger.warning(
            "--admin-api-key without --enable-sleep-mode: of the control routes only those that need no sleep mode "
            "exist (/restart_engine, /abort_requests, /server_info, /shutdown)."
        )
    if server.admin_api_key is None and server.dev_mode:
        _warn_of_open_control_routes(server, enable_sleep_mode=engine.enable_sleep_mode)


def _warn_of_open_control_routes(config: ServerConfig, *, enable_sleep_mode: bool) -> None:
    which = "routes (/sleep, /wake_up, …) are" if enable_sleep_mode else "routes (/restart_engine, /shutdown, …) are"
    logger.warning("Development mode: the control %s open to every caller, without a key.", which)
    if not config.is_loopback:
        logger.warning(
            "DANGER: development mode on %s, which other machines can reach: anyone there can control "
            "this model. Use --admin-api-key, or listen on 127.0.0.1.",
            config.host,
        )


def with_flag(error: ShuteyeError) -> str:
    """What an error says, beginning with the flag that it is about, if it is about one."""
    fields = EngineConfig.__dataclass_fields__ | ServerConfig.__dataclass_fields__
    if error.param not in fields:
        return error.message
    return f"--{error.param.replace('_', '-')}: {error.message}"
