"""What can be asked at any time, asleep or busy: GET /health, /ping, /ready, /version, /state and /metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from shuteye import __version__
from shuteye.errors import EngineNotReady, ServerError
from shuteye.frontend.engine import Engine
from shuteye.server.context import Context
from shuteye.server.generation.chunks import encode_json
from shuteye.server.http.admission import refuse_unless_alive
from shuteye.server.http.auth import InferenceRoute
from shuteye.server.http.errors import error_body, error_headers
from shuteye.server.telemetry.metrics import Metrics
from shuteye.state import EngineState

router = APIRouter()
keyed = APIRouter(route_class=InferenceRoute)


@router.get("/health", response_model=None)
async def health(context: Context) -> Response:
    """200 once the model is loaded, asleep or not; 503 while it loads, or is faulted, hung or dead."""
    engine = context.engine
    if engine.status == "starting":
        return _unhealthy({"status": "loading"}, error_headers(EngineNotReady("loading")))
    try:
        refuse_unless_alive(engine)
    except ServerError as error:
        status = "faulted" if engine.status == "ready" else engine.status
        return _unhealthy({"status": status, **error_body(error)}, error_headers(error))
    return Response(encode_json({"status": "ok"}), media_type="application/json")


def _unhealthy(body: Mapping[str, Any], headers: Mapping[str, str]) -> Response:
    return Response(encode_json(body), 503, headers=headers, media_type="application/json")


@router.get("/ping")
@router.post("/ping", include_in_schema=False)
async def ping() -> dict[str, str]:
    """200 as long as the server itself answers, whatever its engine does."""
    return {"status": "ok"}


@router.get("/version")
async def version() -> dict[str, str]:
    """The version of shuteye."""
    return {"version": __version__}


@router.get("/ready", response_model=None)
async def ready(context: Context) -> Response:
    """200 if a request sent now would run now, else 503 and why not."""
    reason = "stopping" if context.stopping.begun else why_not_ready(context.engine)
    body = {"ready": True} if reason is None else {"ready": False, "reason": reason}
    return Response(encode_json(body), 200 if reason is None else 503, media_type="application/json")


@keyed.get("/state")
async def state(context: Context) -> dict[str, Any]:
    """All that is known of the engine, from what it pushed last; asks it nothing."""
    engine = context.engine
    loaded = engine.status != "starting" and engine.failure is None
    return {
        "status": engine.status,
        "failure": engine.failure.message if engine.failure else engine.hang,
        "models": context.model_names,
        "is_sleeping": engine.is_sleeping,
        "is_paused": engine.is_paused,
        "ready": why_not_ready(engine) is None and not context.stopping.begun,
        "state": asdict(engine.state),
        "waking": _waking_cost(engine.state, context.metrics),
        "model": asdict(engine.info) if loaded else None,
        "stats": asdict(engine.stats),
    }


def why_not_ready(engine: Engine) -> str | None:
    """One word for what keeps requests from running now; None if nothing does."""
    if engine.status != "ready":
        return "loading" if engine.status == "starting" else engine.status
    if engine.state.faulted is not None:
        return "faulted"
    if engine.is_sleeping:
        return "sleeping"
    if engine.is_paused:
        return "paused"
    return None if engine.state.gate == "open" else engine.state.gate


def _waking_cost(state: EngineState, metrics: Metrics) -> dict[str, Any]:
    """What is away and where it is kept, how long the last wake took, and how long the next one should.

    `restore_bytes` must be read or copied; the KV cache comes back empty and costs memory only as it fills.
    `expected_s` goes by the pace of the last wake, and is None before there was one.
    """
    missing = {tag.tag: tag.nbytes - tag.resident_bytes for tag in state.tags if tag.residency != "resident"}
    kept = {
        tag.tag for tag in state.tags if tag.residency in ("offloaded", "discarded")
    }  # blank ones wait for a writer
    restore_bytes = missing.get("weights", 0) if "weights" in kept else 0
    return {
        "restore_bytes": restore_bytes,
        "tags": missing,
        "backings": {tag.tag: tag.backing for tag in state.tags if tag.tag in missing},
        "last_wake_s": metrics.last_wake_s,
        "expected_s": metrics.expected_wake_s(restore_bytes),
    }


@keyed.get("/metrics", response_model=None)
async def metrics(context: Context) -> Response:
    """All metrics; the engine is not asked, so it may be asleep or busy."""
    return Response(context.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST})
