"""Routes of tasks that the served model is not for: they say so, by name, instead of 404.

Knows nothing of those tasks beyond their names.
"""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import APIRouter, Request, Response

from shuteye.errors import InvalidRequest
from shuteye.server.admission import ModelRoute, require_task
from shuteye.server.context import Context

TASK_OF_ROUTE: Mapping[str, str] = {
    "/v1/embeddings": "embed",
    "/pooling": "embed",
    "/score": "score",
    "/v1/score": "score",
    "/rerank": "score",
    "/v1/rerank": "score",
    "/v2/rerank": "score",
    "/v1/audio/transcriptions": "transcribe",
}

router = APIRouter(route_class=ModelRoute, include_in_schema=False)


async def refuse(request: Request, context: Context) -> Response:
    """400 naming the task that this route needs."""
    path = request.url.path
    task = TASK_OF_ROUTE[path]
    require_task(context, task, path)
    raise InvalidRequest(f"{path} is not implemented yet, although the model is for the task '{task}'.")


for _path in TASK_OF_ROUTE:
    router.add_api_route(_path, refuse, methods=["POST"], response_model=None)
