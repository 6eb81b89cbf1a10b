"""The control routes of an application: a request reaches one replica, and acts on all of them.

Paths, parameters and answers are a single server's, with what each replica did beside the sums.
"""

from __future__ import annotations

from typing import Annotated, Any, Protocol, cast

import msgspec
from fastapi import APIRouter, Request, Response

from shuteye.calls import Call, PauseCall, ResetPrefixCacheCall, ResumeCall, SleepCall, WakeCall
from shuteye.errors import InvalidRequest
from shuteye.ray.fleet import FleetReport, FleetState
from shuteye.ray.wanted import AWAKE, after
from shuteye.server.app import EngineRoutes
from shuteye.server.control.calls import NO_QUERY, documented_body, requested
from shuteye.server.control.routes import PauseRequest, SleepAnswer, WakeAnswer, measured
from shuteye.server.http.answers import JsonAnswer
from shuteye.server.http.auth import ControlRoute, InferenceRoute
from shuteye.server.http.errors import error_body, error_headers
from shuteye.state import SleepReport, WakeReport

state_routes = APIRouter(route_class=InferenceRoute)
control_routes = APIRouter(route_class=ControlRoute)
refused_routes = APIRouter(route_class=ControlRoute)

ROUTES = EngineRoutes(state=state_routes, control=control_routes, restart=refused_routes)

REFUSED = {
    "/update_weights": "weights written to one replica would make it differ from the others, and from those that start "
    "later. Deploy the application with the new checkpoint",
    "/reload_weights": "other weights on one replica would make it differ from the others, and from those that start "
    "later. Deploy the application with the new checkpoint",
    "/collective_rpc": "it would ask one replica, which Ray Serve chooses. GET /state tells of all",
    "/abort_requests": "it would end those of one replica, which Ray Serve chooses. POST /pause with mode=abort "
    "ends all",
    "/shutdown": "Ray Serve runs replicas, and stops them: serve delete, or serve shutdown",
    "/restart_engine": "Ray Serve replaces a replica whose engine is dead or hangs by itself",
}
CONTROL_PATHS = frozenset(
    {"/sleep", "/wake_up", "/pause", "/resume", "/reset_prefix_cache", "/is_sleeping", "/is_paused", *REFUSED}
)


class Fleet(Protocol):
    """What the routes ask of the control."""

    async def carry_out(self, call: Call[Any]) -> FleetReport:
        """See `SleepControl.carry_out`."""

    async def look(self) -> FleetState:
        """See `SleepControl.look`."""


def fleet_of(request: Request) -> Fleet:
    """The control that this replica follows."""
    return cast(Fleet, request.app.state.fleet)


async def _answered(request: Request, call: Call[Any]) -> Response:
    after(AWAKE, call)  # refuses what no replica could do
    report = await fleet_of(request).carry_out(call)
    replicas = {"replicas": report.outcomes, "wanted": report.wanted}
    failure = report.failure
    if failure is not None:
        return JsonAnswer(error_body(failure) | replicas, failure.status_code, error_headers(failure))
    return JsonAnswer(_fields(call, report) | replicas)


def _fields(call: Call[Any], report: FleetReport) -> dict[str, Any]:
    """What a single server would answer, with the bytes of all replicas."""
    summed = report.summed
    match call, summed:
        case SleepCall(), SleepReport():
            return _built(SleepAnswer(tags=call.tags, **measured(summed)))
        case WakeCall(), WakeReport():
            asleep = bool(report.wanted.asleep)
            return _built(WakeAnswer(status="sleeping" if asleep else "awake", tags=call.tags, **measured(summed)))
    return {"status": _DONE[type(call)]}


_DONE: dict[type[Call[Any]], str] = {PauseCall: "paused", ResumeCall: "resumed", ResetPrefixCacheCall: "reset"}


def _built(answer: msgspec.Struct) -> dict[str, Any]:
    built: dict[str, Any] = msgspec.to_builtins(answer)
    return built


@control_routes.post("/sleep", response_model=None, openapi_extra=documented_body(SleepCall))
async def sleep(call: Annotated[SleepCall, requested(SleepCall)], request: Request) -> Response:
    """Puts every replica to sleep; 200 once each of them has said what came back."""
    return await _answered(request, call)


@control_routes.post("/wake_up", response_model=None, openapi_extra=documented_body(WakeCall))
async def wake_up(call: Annotated[WakeCall, requested(WakeCall)], request: Request) -> Response:
    """Wakes every replica; 200 once each of them is verified."""
    return await _answered(request, call)


@control_routes.post("/pause", response_model=None, openapi_extra=documented_body(PauseRequest))
async def pause(asked: Annotated[PauseRequest, requested(PauseRequest)], request: Request) -> Response:
    """Closes the gate of every replica, keeping all memory."""
    mode = "wait" if asked.mode is None and asked.wait_for_inflight_requests else asked.mode
    answer = await _answered(request, PauseCall(mode, asked.timeout_s))
    if answer.status_code == 200 and asked.clear_cache and mode != "keep":
        return await _answered(request, ResetPrefixCacheCall())
    return answer


@control_routes.post("/resume", response_model=None)
async def resume(call: Annotated[ResumeCall, requested(ResumeCall)], request: Request) -> Response:
    """Undoes `/pause` on every replica."""
    return await _answered(request, call)


@control_routes.post("/reset_prefix_cache", response_model=None)
async def reset_prefix_cache(
    call: Annotated[ResetPrefixCacheCall, requested(ResetPrefixCacheCall)], request: Request
) -> Response:
    """Every replica forgets which prompts its KV cache holds."""
    return await _answered(request, call)


@control_routes.get("/is_sleeping", response_model=None, dependencies=[NO_QUERY])
async def is_sleeping(request: Request) -> Response:
    """True until every replica that answers has every tag in memory; names those that sleep."""
    found = (await fleet_of(request).look()).require_any()
    return JsonAnswer({"is_sleeping": bool(found.sleeping), "sleeping": found.sleeping} | _asked(found))


@control_routes.get("/is_paused", response_model=None, dependencies=[NO_QUERY])
async def is_paused(request: Request) -> Response:
    """True while a pause is in force on any replica that answers; names those."""
    found = (await fleet_of(request).look()).require_any()
    return JsonAnswer({"is_paused": bool(found.paused), "paused": found.paused} | _asked(found))


def _asked(found: FleetState) -> dict[str, Any]:
    return {"replicas": list(found.states), "failed": [one.replica for one in found.failed]}


@state_routes.get("/state", response_model=None)
async def state(request: Request) -> Response:
    """What is wanted, what each replica is, and a single server's fields summed over them."""
    return JsonAnswer((await fleet_of(request).look()).answer)


async def _refuse(request: Request) -> Response:
    path = request.scope["route"].path
    raise InvalidRequest(f"{path} is not there for replicas on Ray Serve: {REFUSED[path]}.")


for _path in REFUSED:
    refused_routes.add_api_route(_path, _refuse, methods=["POST"], response_model=None, name=_path.removeprefix("/"))
