"""What can be asked at any time, asleep or busy: GET /health, /ping, /ready, /version, /state and /metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from fastapi import APIRouter, Request, Response
from msgspec import UNSET, Struct, UnsetType
from prometheus_client import CONTENT_TYPE_LATEST

from shuteye import __version__
from shuteye.errors import EngineNotReady, ServerError
from shuteye.frontend.engine import Engine, Status
from shuteye.model_info import ModelInfo
from shuteye.server.context import Context, contexts_of
from shuteye.server.http.admission import refuse_unless_alive
from shuteye.server.http.answers import ErrorDetail, JsonAnswer
from shuteye.server.http.auth import InferenceRoute
from shuteye.server.http.errors import error_body, error_headers
from shuteye.server.telemetry.metrics import Metrics
from shuteye.state import EngineState, SchedulerStats, Tag

router = APIRouter()
keyed = APIRouter(route_class=InferenceRoute)
measured = APIRouter(route_class=InferenceRoute)


class AliveAnswer(Struct):
    """Answer of GET /ping, and of GET /health with 200."""

    status: Literal["ok"] = "ok"


class UnhealthyAnswer(Struct):
    """Answer of GET /health with 503; `error` is there unless the model loads."""

    status: Literal["loading", "faulted", "hung", "dead", "failed", "closed"]
    error: ErrorDetail | UnsetType = UNSET


class VersionAnswer(Struct):
    """Answer of GET /version."""

    version: str


class ReadyAnswer(Struct):
    """Answer of GET /ready; `reason` is there unless it is ready."""

    ready: bool
    reason: str | UnsetType = UNSET


class WakingCost(Struct):
    """What is away and where it is kept, how long the last wake took, and how long the next one should.

    `restore_bytes` must be read or copied; the KV cache comes back empty and costs memory only as it fills.
    `expected_s` goes by the pace of the last wake, and is None before there was one.
    """

    restore_bytes: int
    tags: Mapping[Tag, int]
    backings: Mapping[Tag, str | None]
    last_wake_s: float | None
    expected_s: float | None


class StateAnswer(Struct):
    """Answer of GET /state."""

    status: Status
    failure: str | None
    models: Sequence[str]
    is_sleeping: bool
    is_paused: bool
    ready: bool
    state: EngineState
    waking: WakingCost
    model: ModelInfo | None
    stats: SchedulerStats


@router.get("/health", response_model=None)
async def health(context: Context) -> Response:
    """200 once the model is loaded, asleep or not; 503 while it loads, or is faulted, hung or dead."""
    engine = context.engine
    if engine.status == "starting":
        return JsonAnswer(UnhealthyAnswer("loading"), 503, error_headers(EngineNotReady("loading")))
    try:
        refuse_unless_alive(engine)
    except ServerError as error:
        status = engine.status
        answer = UnhealthyAnswer(
            "faulted" if status == "ready" or status == "unloaded" else status,  # noqa: PLR1714 (narrows the type)
            ErrorDetail(**error_body(error)["error"]),
        )
        return JsonAnswer(answer, 503, error_headers(error))
    return JsonAnswer(AliveAnswer())


@router.get("/ping", response_model=None)
@router.post("/ping", include_in_schema=False, response_model=None)
async def ping() -> Response:
    """200 as long as the server itself answers, whatever its engine does."""
    return JsonAnswer(AliveAnswer())


@router.get("/version", response_model=None)
async def version() -> Response:
    """The version of shuteye."""
    return JsonAnswer(VersionAnswer(__version__))


@router.get("/ready", response_model=None)
async def ready(context: Context) -> Response:
    """200 if a request sent now would run now, else 503 and why not."""
    reason = "stopping" if context.stopping.begun else why_not_ready(context.engine)
    return JsonAnswer(ReadyAnswer(True)) if reason is None else JsonAnswer(ReadyAnswer(False, reason), 503)


class LoadAnswer(Struct):
    """Answer of GET /load (vLLM's shape)."""

    server_load: int


@router.get("/load", response_model=None)
async def load(request: Request) -> Response:
    """How many prompts, texts and recordings are being worked on, or wait to be."""
    return JsonAnswer(LoadAnswer(sum(context.metrics.num_in_flight for context in contexts_of(request.app))))


@keyed.get("/state", response_model=None)
async def state(context: Context) -> Response:
    """All that is known of the engine, from what it pushed last; asks it nothing."""
    engine = context.engine
    loaded = engine.status != "starting" and engine.failure is None
    answer = StateAnswer(
        status=engine.status,
        failure=engine.failure.message if engine.failure else engine.hang,
        models=context.model_names,
        is_sleeping=engine.is_sleeping,
        is_paused=engine.is_paused,
        ready=why_not_ready(engine) is None and not context.stopping.begun,
        state=engine.state,
        waking=_waking_cost(engine.state, context.metrics),
        model=engine.info if loaded else None,
        stats=engine.stats,
    )
    return JsonAnswer(answer)


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


def _waking_cost(state: EngineState, metrics: Metrics) -> WakingCost:
    missing = {tag.tag: tag.nbytes - tag.resident_bytes for tag in state.tags if tag.residency != "resident"}
    return WakingCost(
        restore_bytes=state.restore_bytes,
        tags=missing,
        backings={tag.tag: tag.backing for tag in state.tags if tag.tag in missing},
        last_wake_s=metrics.last_wake_s,
        expected_s=metrics.next_wake_s(state),
    )


@measured.get("/metrics", response_model=None)
async def metrics(request: Request) -> Response:
    """All metrics of all models; no engine is asked, so each may be asleep or busy."""
    first, *others = (context.metrics for context in contexts_of(request.app))
    return Response(first.exposition(others), headers={"Content-Type": CONTENT_TYPE_LATEST})
