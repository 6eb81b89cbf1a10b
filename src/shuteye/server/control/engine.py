"""POST /collective_rpc and /restart_engine: questions to every rank; the way back from a dead or hung engine.

Knows nothing of ranks or processes.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict

from shuteye.errors import InvalidRequest, TransitionConflict
from shuteye.server.context import Context
from shuteye.server.control.bodies import with_body
from shuteye.server.control.sleep import NoQuery
from shuteye.server.http.admission import refuse_if_stopping
from shuteye.server.http.auth import ControlRoute

router = APIRouter(route_class=ControlRoute)
restarting = APIRouter(route_class=ControlRoute)
"""Served without sleep mode, too."""


class RpcBody(BaseModel):
    """vLLM's shape. `kwargs` and `timeout` are known and refused: no verb takes the one, and calls wait their turn."""

    model_config = ConfigDict(extra="forbid", strict=True)

    method: str
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    timeout: float | None = None


@router.post("/collective_rpc")
async def collective_rpc(_query: Annotated[NoQuery, Query()], body: RpcBody, context: Context) -> dict[str, list[Any]]:
    """Calls a verb that changes nothing on every rank; one result a rank."""
    if body.kwargs:
        raise InvalidRequest("kwargs must be empty: no verb takes any; use args.", param="kwargs")
    if body.timeout is not None:
        raise InvalidRequest("timeout is not supported: control calls are carried out in order.", param="timeout")
    return {"results": await context.engine.collective_rpc(body.method, body.args)}


@restarting.post("/restart_engine")
async def restart_engine(query: Annotated[NoQuery, Query()], request: Request, context: Context) -> dict[str, Any]:
    """Starts an engine anew that is dead or hangs, in the same server; answers once the model is loaded."""
    await with_body(query, request)
    refuse_if_stopping(context)
    engine = context.engine
    if engine.failure is None and engine.hang is None:
        raise TransitionConflict(f"The engine is {engine.status}; only one that is dead or hangs can be restarted.")
    began = time.perf_counter()
    await context.metrics.transition("restart", engine.restart())
    return {"status": engine.status, "seconds": time.perf_counter() - began}
