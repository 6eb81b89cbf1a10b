"""GET /metrics, in Prometheus' text format.

Knows nothing of what is measured.
"""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from shuteye.server.auth import InferenceRoute
from shuteye.server.context import Context

router = APIRouter(route_class=InferenceRoute)


@router.get("/metrics", response_model=None)
async def metrics(context: Context) -> Response:
    """All metrics; the engine is not asked, so it may be asleep or busy."""
    return Response(context.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST})
