"""POST /update_weights: new values for weights, from a file on this host or uploaded.

Knows nothing of tensors: the engine reads the safetensors format.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from shuteye.errors import InvalidRequest
from shuteye.server.context import Context, ServerContext
from shuteye.server.control.bodies import media_type, read_json
from shuteye.server.control.sleep import NoQuery
from shuteye.server.http.auth import ControlRoute
from shuteye.server.http.bodies import received_file
from shuteye.server.http.events import unabandoned
from shuteye.server.http.limits import limited
from shuteye.state import UpdateReport

router = APIRouter(route_class=ControlRoute)

PATH = "/update_weights"
UPLOAD = "application/octet-stream"
SLACK_BYTES = 16 * 1024 * 1024
"""For names and shapes at the head of an upload."""


class UpdateBody(BaseModel):
    """Where the tensors are: a `.safetensors` file, or a directory of them, on the server's host."""

    model_config = ConfigDict(extra="forbid", strict=True)

    path: str = Field(min_length=1)


_DOCUMENTED = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": UpdateBody.model_json_schema()},
            UPLOAD: {"schema": {"type": "string", "format": "binary", "description": "A safetensors file's bytes."}},
        },
    }
}


@router.post(PATH, openapi_extra=_DOCUMENTED)
async def update_weights(_query: Annotated[NoQuery, Query()], request: Request, context: Context) -> dict[str, Any]:
    """Writes tensors by their checkpoint names; requests in flight are computed again with the new weights."""
    kind = media_type(request)
    if kind == UPLOAD:
        return asdict(await _uploaded(request, context))
    if kind != "application/json":
        raise InvalidRequest(
            f'Content-Type must be application/json with {{"path": …}}, or {UPLOAD} with the bytes of a safetensors '
            f"file, got {kind or 'none'}."
        )
    body = await _json_body(request, context)
    return asdict(await _update(context, body.path))


async def _update(context: ServerContext, path: str) -> UpdateReport:
    return await context.metrics.transition("update_weights", context.engine.update_weights_from_file(path))


async def _uploaded(request: Request, context: ServerContext) -> UpdateReport:
    """No update can be larger than the model in its widest form: eight bytes for every two of bfloat16."""
    limit = 4 * context.engine.info.weights_bytes + SLACK_BYTES
    async with received_file(request, max_bytes=limit) as path:
        return await unabandoned(_update(context, path))  # the engine may open the path up to its answer


async def _json_body(request: Request, context: ServerContext) -> UpdateBody:
    receive = limited(request.scope, request.receive, max_bytes=context.config.max_body_bytes)
    content = await Request(request.scope, receive).body()
    return read_json(UpdateBody, content, max_bytes=context.config.max_json_bytes)
