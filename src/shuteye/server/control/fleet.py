"""What a fleet of models tells, and the leases of its memory: GET /v1/fleet, and POST, GET, PUT, DELETE /v1/leases.

A lease is bytes of the budget that somebody else may use for a while; models sleep for it and are woken after it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Literal, cast

from fastapi import APIRouter, Request, Response
from msgspec import Struct
from pydantic import BaseModel, ConfigDict, Field

from shuteye.fleet.actions import GrantLease, Obstacle, RefuseLease
from shuteye.fleet.events import LeaseClaimed
from shuteye.fleet.status import LeaseStatus, ModelStatus, RoomStatus
from shuteye.frontend.fleet_driver import FleetDriver
from shuteye.server.http.answers import ErrorDetail, JsonAnswer
from shuteye.server.http.auth import ControlRoute, InferenceRoute
from shuteye.server.http.events import until_disconnect

router = APIRouter(route_class=InferenceRoute)
leases = APIRouter(route_class=ControlRoute)

MAX_TTL_S = 7 * 24 * 3600.0
MAX_WITHIN_S = 3600.0


def driver_of(request: Request) -> FleetDriver:
    """Who moves the models of the app that this request came to."""
    return cast(FleetDriver, request.app.state.fleet_driver)


# --- what is known ------------------------------------------------------------------------------


class FleetModelAnswer(Struct):
    """One model; seconds from now, bytes by the system's account.

    `charged_bytes` is what is counted for it, with what its KV cache may grow by, and with the larger end of a
    transition; `sleeps_in_s` is null unless it is idle and sleeps for that.
    """

    model: str
    phase: str
    depth: str
    owner: str | None
    resident_bytes: int | None
    charged_bytes: int
    running: int
    held: int
    pinned: bool
    paused: bool
    sleeps_in_s: float | None
    wake_s: float


class FleetAnswer(Struct):
    """Answer of GET /v1/fleet."""

    budget_bytes: int
    charged_bytes: int
    leased_bytes: int
    claimed_bytes: int
    held_requests: int
    models: Sequence[FleetModelAnswer]


@router.get("/v1/fleet", response_model=None)
async def fleet(request: Request) -> Response:
    """Tells the budget, and where each model is; wakes nothing."""
    driver = driver_of(request)
    room: RoomStatus = driver.room()
    now = time.monotonic()
    return JsonAnswer(
        FleetAnswer(
            room.budget_bytes,
            room.charged_bytes,
            room.leased_bytes,
            room.claimed_bytes,
            room.held_requests,
            [_model(status, now) for status in driver.models()],
        )
    )


def _model(status: ModelStatus, now: float) -> FleetModelAnswer:
    return FleetModelAnswer(
        model=status.model,
        phase=status.phase.value,
        depth=status.depth.name.lower(),
        owner=status.owner.value if status.owner is not None else None,
        resident_bytes=status.resident_bytes,
        charged_bytes=status.charged_bytes,
        running=status.running,
        held=status.held,
        pinned=status.pinned,
        paused=status.paused,
        sleeps_in_s=None if status.idle_at is None else max(0.0, status.idle_at - now),
        wake_s=status.wake_s,
    )


# --- leases -------------------------------------------------------------------------------------


class LeaseBody(BaseModel):
    """What is asked for: so many bytes, within so many seconds, for so long."""

    model_config = ConfigDict(extra="forbid", strict=True)

    bytes: Annotated[int, Field(gt=0)]
    within_s: Annotated[float, Field(ge=0, le=MAX_WITHIN_S)] = 10.0
    ttl_s: Annotated[float, Field(gt=0, le=MAX_TTL_S)] = 600.0
    holder: Annotated[str, Field(max_length=256)] = ""
    priority: int = 0
    may_sleep: Annotated[list[str] | None, Field(max_length=10_000)] = None
    restore: bool = True
    dry_run: bool = False


class RenewalBody(BaseModel):
    """For how long from now on."""

    model_config = ConfigDict(extra="forbid", strict=True)

    ttl_s: Annotated[float, Field(gt=0, le=MAX_TTL_S)] = 600.0


class LeaseAnswer(Struct):
    """A lease that was granted, or with `dry_run` would be; `id` is then null.

    `freed_bytes` is what the sleeps gave back by the system's account, `restore_s` what waking them again should take.
    """

    id: str | None
    bytes: int
    expires_in_s: float
    slept: Sequence[str]
    freed_bytes: int
    restore_s: float


class RefusedLeaseAnswer(Struct):
    """Answer with 409: the most that could be had now, and what stands in the way of more."""

    error: ErrorDetail
    available_bytes: int
    in_the_way: Sequence[Obstacle]


class HeldLeaseAnswer(Struct):
    """One lease or claim, as GET /v1/leases has it; a claim that waits for its bytes has no end yet."""

    id: str
    holder: str
    bytes: int
    used_bytes: int | None
    slept: Sequence[str]
    expires_in_s: float | None


class LeasesAnswer(Struct):
    """Answer of GET /v1/leases."""

    leases: Sequence[HeldLeaseAnswer]


class ReleasedAnswer(Struct):
    """Answer of DELETE /v1/leases/{id}."""

    status: Literal["released"] = "released"


@leases.post("/v1/leases", response_model=None)
async def claim(body: LeaseBody, request: Request) -> Response:
    """Frees memory for somebody else: 201 once it is free, or 409 with what could be had."""
    driver = driver_of(request)
    outcome = await until_disconnect(request.receive, driver.claim(_claim(driver.new_lease_id(), body)))
    if isinstance(outcome, RefuseLease):
        return JsonAnswer(_refused(outcome, body), 409)
    return JsonAnswer(_granted(outcome), 200 if body.dry_run else 201)


def _claim(lease_id: str, body: LeaseBody) -> LeaseClaimed:
    may_sleep = None if body.may_sleep is None else tuple(body.may_sleep)
    return LeaseClaimed(
        lease_id=lease_id,
        nbytes=body.bytes,
        within_s=body.within_s,
        ttl_s=body.ttl_s,
        holder=body.holder,
        priority=body.priority,
        may_sleep=may_sleep,
        restore=body.restore,
        dry_run=body.dry_run,
    )


def _granted(granted: GrantLease) -> LeaseAnswer:
    return LeaseAnswer(
        id=None if granted.dry_run else granted.lease_id,
        bytes=granted.nbytes,
        expires_in_s=max(0.0, granted.expires_at - time.monotonic()),
        slept=granted.slept,
        freed_bytes=granted.freed_bytes,
        restore_s=granted.restore_s,
    )


def _refused(refused: RefuseLease, body: LeaseBody) -> RefusedLeaseAnswer:
    when = f" within {body.within_s:g} seconds" if refused.timed_out else ""
    obstacles = ", ".join(f"{one.name} ({one.why}, {one.nbytes:,} bytes)" for one in refused.in_the_way[:5])
    message = (
        f"{body.bytes:,} bytes could not be freed{when}; {refused.available_bytes:,} can be had now."
        f"{f' In the way: {obstacles}.' if obstacles else ''} Nothing was changed."
    )
    error = ErrorDetail(message=message, type="LeaseRefusedError", param="bytes", code=409)
    return RefusedLeaseAnswer(error, refused.available_bytes, refused.in_the_way)


@leases.get("/v1/leases", response_model=None)
async def list_leases(request: Request) -> Response:
    """Tells all leases, and the claims that wait."""
    now = time.monotonic()
    return JsonAnswer(LeasesAnswer([_held(status, now) for status in driver_of(request).leases()]))


def _held(status: LeaseStatus, now: float) -> HeldLeaseAnswer:
    return HeldLeaseAnswer(
        id=status.lease_id,
        holder=status.holder,
        bytes=status.nbytes,
        used_bytes=status.used_bytes,
        slept=status.slept,
        expires_in_s=None if status.expires_at is None else max(0.0, status.expires_at - now),
    )


@leases.put("/v1/leases/{lease_id}", response_model=None)
async def renew(lease_id: str, body: RenewalBody, request: Request) -> Response:
    """Lets a lease last `ttl_s` from now; 410 if it is over, for it stays over."""
    driver = driver_of(request)
    driver.renew(lease_id, body.ttl_s)
    now = time.monotonic()
    (status,) = (one for one in driver.leases() if one.lease_id == lease_id)
    return JsonAnswer(_held(status, now))


@leases.delete("/v1/leases/{lease_id}", response_model=None)
async def release(lease_id: str, request: Request) -> Response:
    """Ends a lease, and wakes what slept for it, as room allows; 410 if it is over."""
    driver_of(request).release(lease_id)
    return JsonAnswer(ReleasedAnswer())
