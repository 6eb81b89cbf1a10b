"""The control routes: sleeping, pausing, loading weights anew, and whether it sleeps or is paused.

Knows nothing of the transition table: the engine decides, the errors say why not.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field, field_validator

from shuteye.server.context import Context
from shuteye.server.control.bodies import documented_body, with_body
from shuteye.server.http.auth import ControlRoute
from shuteye.state import SleepReport, WakeReport

router = APIRouter(route_class=ControlRoute)


class _Query(BaseModel):
    """Parameters of a call, in the query or as a JSON body."""

    model_config = ConfigDict(extra="forbid")


class _Tags(_Query):
    tags: list[str] | None = None

    @field_validator("tags")
    @classmethod
    def _split(cls, tags: list[str] | None) -> list[str] | None:
        if tags is None:
            return None
        return [tag.strip() for joined in tags for tag in joined.split(",") if tag.strip()]


class SleepQuery(_Tags):
    """`tags` may be repeated, or separated by commas; `timeout` is in seconds, for mode `wait`."""

    level: int = 1
    mode: str | None = None
    timeout: float | None = Field(default=None, gt=0, allow_inf_nan=False)


class WakeQuery(_Tags):
    """`tags` may be repeated, or separated by commas."""


class PauseQuery(_Query):
    """vLLM's parameters; `wait_for_inflight_requests` is its older way to say `mode=wait`."""

    mode: str | None = None
    timeout: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    clear_cache: bool = False
    wait_for_inflight_requests: bool = False


class NoQuery(_Query):
    """No parameters."""


class ReloadBody(BaseModel):
    """Where to load from; None means the checkpoint that was served."""

    model_config = ConfigDict(extra="forbid", strict=True)

    path: str | None = None


def _answer(report: SleepReport | WakeReport, *, status: str, tags: list[str] | None) -> dict[str, Any]:
    """The report with vLLM's keys: `tags` are the names that were asked for, so what was measured is `tag_reports`."""
    measured = asdict(report)
    return {"status": status, "tags": tags, "tag_reports": measured.pop("tags"), **measured}


@router.post("/sleep", openapi_extra=documented_body(SleepQuery))
async def sleep(query: Annotated[SleepQuery, Query()], request: Request, context: Context) -> dict[str, Any]:
    """Gives memory back; answers once the system says that it came back. Parameters may also be a JSON body."""
    call = await with_body(query, request)
    work = context.engine.sleep(call.level, tags=call.tags, mode=call.mode, timeout_s=call.timeout)
    return _answer(await context.metrics.transition("sleep", work), status="sleeping", tags=call.tags)


@router.post("/wake_up", openapi_extra=documented_body(WakeQuery))
async def wake_up(query: Annotated[WakeQuery, Query()], request: Request, context: Context) -> dict[str, Any]:
    """Brings memory back; answers once the model is verified. Parameters may also be a JSON body."""
    call = await with_body(query, request)
    report = await context.metrics.transition("wake_up", context.engine.wake_up(call.tags))
    return _answer(report, status="sleeping" if context.engine.is_sleeping else "awake", tags=call.tags)


@router.get("/is_sleeping")
async def is_sleeping(_query: Annotated[NoQuery, Query()], context: Context) -> dict[str, bool]:
    """True until every tag is resident and loaded."""
    return {"is_sleeping": context.engine.is_sleeping}


@router.post("/pause", openapi_extra=documented_body(PauseQuery))
async def pause(query: Annotated[PauseQuery, Query()], request: Request, context: Context) -> dict[str, str]:
    """Stops running requests, keeping all memory; new ones get 503, or wait after mode `keep`. Or as a JSON body."""
    call = await with_body(query, request)
    mode = "wait" if call.mode is None and call.wait_for_inflight_requests else call.mode
    await context.metrics.transition("pause", context.engine.pause(mode, timeout_s=call.timeout))
    if call.clear_cache and mode != "keep":
        await context.engine.reset_prefix_cache()
    return {"status": "paused"}


@router.post("/resume")
async def resume(query: Annotated[NoQuery, Query()], request: Request, context: Context) -> dict[str, str]:
    """Undoes `/pause`."""
    await with_body(query, request)
    await context.metrics.transition("resume", context.engine.resume())
    return {"status": "resumed"}


@router.get("/is_paused")
async def is_paused(_query: Annotated[NoQuery, Query()], context: Context) -> dict[str, bool]:
    """True between `/pause` and `/resume`."""
    return {"is_paused": context.engine.is_paused}


@router.post("/reload_weights")
async def reload_weights(
    _query: Annotated[NoQuery, Query()], context: Context, body: ReloadBody | None = None
) -> dict[str, Any]:
    """Writes every weight anew."""
    work = context.engine.reload_weights(body.path if body else None)
    return asdict(await context.metrics.transition("reload_weights", work))


@router.post("/reset_prefix_cache")
async def reset_prefix_cache(query: Annotated[NoQuery, Query()], request: Request, context: Context) -> dict[str, str]:
    """Forgets which prompts the KV cache holds."""
    await with_body(query, request)
    await context.engine.reset_prefix_cache()
    return {"status": "reset"}
