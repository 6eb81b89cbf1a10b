"""The control routes: sleeping, pausing, loading weights anew, and whether it sleeps or is paused.

Knows nothing of the transition table: the engine decides, the errors say why not.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from shuteye.server.auth import ControlRoute
from shuteye.server.context import Context

router = APIRouter(route_class=ControlRoute)


class _Query(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SleepQuery(_Query):
    """`tags` may be repeated, or separated by commas; `timeout` is in seconds, for mode `wait`."""

    level: int = 1
    mode: str | None = None
    tags: list[str] | None = None
    timeout: float | None = Field(default=None, gt=0, allow_inf_nan=False)


class WakeQuery(_Query):
    """`tags` may be repeated, or separated by commas."""

    tags: list[str] | None = None


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


def _split(tags: list[str] | None) -> list[str] | None:
    if tags is None:
        return None
    return [tag.strip() for joined in tags for tag in joined.split(",") if tag.strip()]


@router.post("/sleep")
async def sleep(query: Annotated[SleepQuery, Query()], context: Context) -> dict[str, Any]:
    """Gives memory back; answers once the system says that it came back."""
    work = context.engine.sleep(query.level, tags=_split(query.tags), mode=query.mode, timeout_s=query.timeout)
    return asdict(await context.metrics.transition("sleep", work))


@router.post("/wake_up")
async def wake_up(query: Annotated[WakeQuery, Query()], context: Context) -> dict[str, Any]:
    """Brings memory back; answers once the model is verified."""
    return asdict(await context.metrics.transition("wake_up", context.engine.wake_up(_split(query.tags))))


@router.get("/is_sleeping")
async def is_sleeping(_query: Annotated[NoQuery, Query()], context: Context) -> dict[str, bool]:
    """True until every tag is resident and loaded."""
    return {"is_sleeping": context.engine.is_sleeping}


@router.post("/pause")
async def pause(query: Annotated[PauseQuery, Query()], context: Context) -> dict[str, str]:
    """Stops running requests, keeping all memory."""
    mode = "wait" if query.mode is None and query.wait_for_inflight_requests else query.mode
    await context.metrics.transition("pause", context.engine.pause(mode, timeout_s=query.timeout))
    if query.clear_cache and mode != "keep":
        await context.engine.reset_prefix_cache()
    return {"status": "paused"}


@router.post("/resume")
async def resume(_query: Annotated[NoQuery, Query()], context: Context) -> dict[str, str]:
    """Undoes `/pause`."""
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
async def reset_prefix_cache(_query: Annotated[NoQuery, Query()], context: Context) -> dict[str, str]:
    """Forgets which prompts the KV cache holds."""
    await context.engine.reset_prefix_cache()
    return {"status": "reset"}
