"""GET /v1/models: the names this server answers to; works while asleep.

Knows nothing of where the model came from.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from shuteye.server.auth import InferenceRoute
from shuteye.server.context import Context, ServerContext

router = APIRouter(prefix="/v1/models", route_class=InferenceRoute)


@router.get("")
async def list_models(context: Context) -> dict[str, Any]:
    """All served names."""
    return {"object": "list", "data": [_card(name, context) for name in context.model_names]}


@router.get("/{name:path}")
async def retrieve_model(name: str, context: Context) -> dict[str, Any]:
    """One served name, which may hold slashes."""
    return _card(context.served_name(name), context)


def _card(name: str, context: ServerContext) -> dict[str, Any]:
    engine = context.engine
    loaded = engine.status != "starting" and engine.failure is None
    return {
        "id": name,
        "object": "model",
        "created": context.created,
        "owned_by": "shuteye",
        "root": engine.config.model,
        "parent": None,
        "max_model_len": engine.info.max_model_len if loaded else engine.config.max_model_len,
    }
