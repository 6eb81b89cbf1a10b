"""POST /classify: which of its classes a text belongs to, in vLLM's shape."""

from __future__ import annotations

import time
from typing import Literal

from fastapi import APIRouter, Request, Response
from msgspec import Struct

from shuteye.server.context import Context
from shuteye.server.generation.answer import new_request_id
from shuteye.server.http.admission import ModelRoute, needs_task
from shuteye.server.http.answers import JsonAnswer
from shuteye.server.openai.embeddings import PooledBody, classes
from shuteye.server.openai.pooling import PoolingUsage, usage_of


class ClassificationDatum(Struct):
    """What one text is: a number per class, and the name of the class with the largest."""

    index: int
    label: str | None
    probs: list[float]
    num_classes: int


class ClassificationAnswer(Struct, kw_only=True):
    """POST /classify (vLLM's shape)."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[ClassificationDatum]
    usage: PoolingUsage


router = APIRouter(route_class=ModelRoute)


@router.post("/classify", response_model=None, dependencies=[needs_task("classify", "score")])
async def classify(request: Request, body: PooledBody, context: Context) -> Response:
    """Classifies one or more texts, token ids or conversations."""
    model, request_id, created = context.served_name(body.model), new_request_id("classify"), int(time.time())
    outputs = await classes(request, body, context)
    data = [
        ClassificationDatum(index, found.label, found.probs, found.num_classes)
        for index, found in enumerate(each.outputs for each in outputs)
    ]
    usage = usage_of(outputs)
    return JsonAnswer(ClassificationAnswer(id=request_id, created=created, model=model, data=data, usage=usage))
