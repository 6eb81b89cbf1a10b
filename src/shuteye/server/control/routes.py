"""The control routes: sleeping, pausing, weights, questions to every rank, and starting a dead engine again.

Knows nothing of the transition table: the engine decides, the errors say why not.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec
from fastapi import APIRouter, Request, Response
from msgspec import Struct

from shuteye.calls import (
    Call,
    PauseCall,
    ReloadCall,
    ResetPrefixCacheCall,
    ResumeCall,
    RpcCall,
    SleepCall,
    UnloadCall,
    UpdateFromFileCall,
    WakeCall,
)
from shuteye.errors import InvalidRequest, TransitionConflict
from shuteye.server.context import Context, ServerContext
from shuteye.server.control.calls import (
    NO_QUERY,
    call_of,
    documented_body,
    media_type,
    model_of,
    read_json,
    requested,
)
from shuteye.server.http.admission import refuse_if_stopping
from shuteye.server.http.answers import JsonAnswer
from shuteye.server.http.auth import ControlRoute
from shuteye.server.http.bodies import received_file
from shuteye.server.http.events import run_to_completion
from shuteye.server.http.middleware import limited
from shuteye.state import RankReport, SleepReport, TagReport, UpdateReport, WakeReport

R = TypeVar("R")

router = APIRouter(route_class=ControlRoute)
restarting = APIRouter(route_class=ControlRoute)
"""Served without sleep mode, too."""

UPDATE_PATH = "/update_weights"
UPLOAD = "application/octet-stream"
SLACK_BYTES = 16 * 1024 * 1024
"""For names and shapes at the head of an upload."""


class PauseRequest(PauseCall, frozen=True):
    """vLLM's parameters; `wait_for_inflight_requests` is its older way to say `mode=wait`."""

    clear_cache: bool = False
    wait_for_inflight_requests: bool = False


class RpcRequest(RpcCall, frozen=True):
    """vLLM's shape. `kwargs` and `timeout` are known and refused: no verb takes the one, and calls wait their turn."""

    kwargs: dict[str, Any] = msgspec.field(default_factory=dict)
    timeout: float | None = None


class RestartRequest(Call[None], frozen=True):
    """Of the server, not of the engine."""

    verb: ClassVar[str] = "restart"


async def _carried_out(context: ServerContext, call: Call[R]) -> R:
    return await context.metrics.transition(call.verb, context.engine.control(call))


class DoneAnswer(Struct):
    """Answer of control calls that have no report."""

    status: str


# --- sleep and pause ----------------------------------------------------------------------------


class SleepAnswer(Struct, kw_only=True):
    """Answer of POST /sleep: vLLM's `status` and `level`, the tags that were asked for, and what was measured."""

    status: Literal["sleeping"] = "sleeping"
    tags: Sequence[str] | None
    tag_reports: tuple[TagReport, ...]
    changed: bool
    level: int
    freed_bytes: int
    residual_bytes: int
    seconds: float
    aborted_requests: int
    held_requests: int
    ranks: tuple[RankReport, ...]


class WakeAnswer(Struct, kw_only=True):
    """Answer of POST /wake_up: vLLM's `status` and `tags` (those that were asked for), and what was measured."""

    status: Literal["awake", "sleeping"]
    tags: Sequence[str] | None
    tag_reports: tuple[TagReport, ...]
    changed: bool
    restored_bytes: int
    verified: str
    verified_bytes: int
    canary: bool
    weights_source: str | None
    missing: tuple[str, ...]
    updates_lost: bool
    seconds: float
    ranks: tuple[RankReport, ...]


class SleepingAnswer(Struct):
    """Answer of GET /is_sleeping."""

    is_sleeping: bool


class PausedAnswer(Struct):
    """Answer of GET /is_paused."""

    is_paused: bool


def measured(report: SleepReport | WakeReport) -> dict[str, Any]:
    """What a report says, by the answer's names: `tags` are those asked for, so what was measured is `tag_reports`."""
    fields = {each.name: getattr(report, each.name) for each in dataclasses.fields(report)}
    return {"tag_reports": fields.pop("tags"), **fields}


@router.post("/sleep", response_model=None, openapi_extra=documented_body(SleepCall))
async def sleep(call: Annotated[SleepCall, requested(SleepCall)], context: Context) -> Response:
    """Gives memory back; answers once the system says that it came back. Parameters may also be a JSON body."""
    report = await _carried_out(context, call)
    return JsonAnswer(SleepAnswer(tags=call.tags, **measured(report)))


@router.post("/wake_up", response_model=None, openapi_extra=documented_body(WakeCall))
async def wake_up(call: Annotated[WakeCall, requested(WakeCall)], context: Context) -> Response:
    """Brings memory back; answers once the model is verified. Parameters may also be a JSON body."""
    report = await _carried_out(context, call)
    status: Literal["awake", "sleeping"] = "sleeping" if context.engine.is_sleeping else "awake"
    return JsonAnswer(WakeAnswer(status=status, tags=call.tags, **measured(report)))


@router.post("/unload", response_model=None, openapi_extra=documented_body(UnloadCall))
async def unload(call: Annotated[UnloadCall, requested(UnloadCall)], context: Context) -> Response:
    """Gives everything back, the engine's process included; `/wake_up` starts another. Or as a JSON body."""
    report = await _carried_out(context, call)
    return JsonAnswer(SleepAnswer(tags=None, **measured(report)))


@router.get("/is_sleeping", response_model=None, dependencies=[NO_QUERY])
async def is_sleeping(context: Context) -> Response:
    """True until every tag is resident and loaded."""
    return JsonAnswer(SleepingAnswer(context.engine.is_sleeping))


@router.post("/pause", response_model=None, openapi_extra=documented_body(PauseRequest))
async def pause(asked: Annotated[PauseRequest, requested(PauseRequest)], context: Context) -> Response:
    """Stops running requests, keeping all memory; new ones get 503, or wait after mode `keep`. Or as a JSON body."""
    mode = "wait" if asked.mode is None and asked.wait_for_inflight_requests else asked.mode
    await _carried_out(context, PauseCall(mode, asked.timeout_s))
    if asked.clear_cache and mode != "keep":
        await context.engine.reset_prefix_cache()
    return JsonAnswer(DoneAnswer("paused"))


@router.post("/resume", response_model=None)
async def resume(call: Annotated[ResumeCall, requested(ResumeCall)], context: Context) -> Response:
    """Undoes `/pause`."""
    await _carried_out(context, call)
    return JsonAnswer(DoneAnswer("resumed"))


@router.get("/is_paused", response_model=None, dependencies=[NO_QUERY])
async def is_paused(context: Context) -> Response:
    """True between `/pause` and `/resume`."""
    return JsonAnswer(PausedAnswer(context.engine.is_paused))


# --- weights ------------------------------------------------------------------------------------

_UPLOADED = {UPLOAD: {"schema": {"type": "string", "format": "binary", "description": "A safetensors file's bytes."}}}


@router.post(
    UPDATE_PATH,
    response_model=None,
    dependencies=[NO_QUERY],
    openapi_extra=documented_body(UpdateFromFileCall, **_UPLOADED),
)
async def update_weights(request: Request, context: Context) -> Response:
    """Writes tensors by their checkpoint names; requests in flight are computed again with the new weights."""
    kind = media_type(request)
    if kind == UPLOAD:
        return JsonAnswer(await _uploaded(request, context))
    if kind != "application/json":
        raise InvalidRequest(
            f'Content-Type must be application/json with {{"path": …}}, or {UPLOAD} with the bytes of a safetensors '
            f"file, got {kind or 'none'}."
        )
    receive = limited(request.scope, request.receive, max_bytes=context.config.max_body_bytes)
    content = await Request(request.scope, receive).body()
    body = read_json(model_of(UpdateFromFileCall), content, max_bytes=context.config.max_json_bytes)
    return JsonAnswer(await _carried_out(context, call_of(UpdateFromFileCall, body)))


async def _uploaded(request: Request, context: ServerContext) -> UpdateReport:
    """No update can be larger than the model in its widest form: eight bytes for every two of bfloat16."""
    limit = 4 * context.engine.info.weights_bytes + SLACK_BYTES
    async with received_file(request, max_bytes=limit) as path:
        # its end is when nobody opens `path` any more
        return await run_to_completion(_carried_out(context, UpdateFromFileCall(path)))


@router.post("/reload_weights", response_model=None, openapi_extra=documented_body(ReloadCall))
async def reload_weights(
    call: Annotated[ReloadCall, requested(ReloadCall, in_query=False)], context: Context
) -> Response:
    """Writes every weight again."""
    return JsonAnswer(await _carried_out(context, call))


@router.post("/reset_prefix_cache", response_model=None)
async def reset_prefix_cache(
    call: Annotated[ResetPrefixCacheCall, requested(ResetPrefixCacheCall)], context: Context
) -> Response:
    """Forgets which prompts the KV cache holds."""
    await context.engine.control(call)
    return JsonAnswer(DoneAnswer("reset"))


@router.post("/release_kv_cache_memory", response_model=None, dependencies=[NO_QUERY])
async def release_kv_cache_memory(context: Context) -> Response:
    """Gives the KV cache back while paused; `/wake_up` brings it back."""
    if not context.engine.is_paused:
        raise TransitionConflict("The KV cache is given back only while nothing runs; POST /pause first.")
    await _carried_out(context, SleepCall(level=1, tags=("kv_cache",)))
    return JsonAnswer(DoneAnswer("kv_cache_released"))


# --- the engine ---------------------------------------------------------------------------------


class RpcAnswer(Struct):
    """One result a rank."""

    results: list[Any]


class WorldSizeAnswer(Struct):
    """Answer of GET /get_world_size."""

    world_size: int


class RestartAnswer(Struct):
    """The engine that was dead is loaded again."""

    status: str
    seconds: float


@router.get("/get_world_size", response_model=None)
async def get_world_size(context: Context, include_dp: bool = True) -> Response:  # one replica
    """How many ranks compute the model together."""
    config = context.engine.config
    return JsonAnswer(WorldSizeAnswer(config.tensor_parallel_size * config.pipeline_parallel_size))


@router.post("/collective_rpc", response_model=None, openapi_extra=documented_body(RpcRequest))
async def collective_rpc(
    asked: Annotated[RpcRequest, requested(RpcRequest, in_query=False)], context: Context
) -> Response:
    """Calls a verb that changes nothing, or `reload_weights`, on every rank; one result a rank."""
    if asked.kwargs:
        raise InvalidRequest("kwargs must be empty: no verb takes any; use args.", param="kwargs")
    if asked.timeout is not None:
        raise InvalidRequest("timeout is not supported: control calls are carried out in order.", param="timeout")
    call = RpcCall(asked.method, asked.args)
    if asked.method == ReloadCall.verb:
        return JsonAnswer(RpcAnswer(await context.metrics.transition(ReloadCall.verb, context.engine.control(call))))
    return JsonAnswer(RpcAnswer(await context.engine.control(call)))


@restarting.post("/restart_engine", response_model=None)
async def restart_engine(call: Annotated[RestartRequest, requested(RestartRequest)], context: Context) -> Response:
    """Starts an engine again that is dead or hangs, in the same server; answers once the model is loaded."""
    refuse_if_stopping(context)
    engine = context.engine
    if engine.failure is None and engine.hang is None:
        raise TransitionConflict(f"The engine is {engine.status}; only one that is dead or hangs can be restarted.")
    began = time.perf_counter()
    await context.metrics.transition(call.verb, engine.restart())
    return JsonAnswer(RestartAnswer(engine.status, time.perf_counter() - began))
