"""POST /v1/embeddings and /pooling.

Knows nothing of how vectors are made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from shuteye.outputs import EmbeddingRequestOutput
from shuteye.server.admission import ModelRoute, needs_task
from shuteye.server.answer import new_request_id
from shuteye.server.budget import require_sequences
from shuteye.server.context import Context, ServerContext
from shuteye.server.disconnect import until_disconnect
from shuteye.server.protocol.chunks import encode_json
from shuteye.server.protocol.pooling import EmbeddingBody, PoolingBody, embedding_data, pooling_data, token_usage

router = APIRouter(route_class=ModelRoute)

Write = Callable[[Sequence[EmbeddingRequestOutput], str | None], list[dict[str, Any]]]


@router.post("/v1/embeddings", response_model=None, dependencies=[needs_task("embed")])
async def embeddings(request: Request, body: EmbeddingBody, context: Context) -> Response:
    """Embeds one or more texts."""
    return await _answer(request, body, context, prefix="embd", write=embedding_data)


@router.post("/pooling", response_model=None, dependencies=[needs_task("embed")])
async def pooling(request: Request, body: PoolingBody, context: Context) -> Response:
    """Embeds one or more texts, and answers in vLLM's shape."""
    return await _answer(request, body, context, prefix="pool", write=pooling_data)


async def _answer(
    request: Request, body: EmbeddingBody, context: ServerContext, *, prefix: str, write: Write
) -> Response:
    model, request_id, created = context.served_name(body.model), new_request_id(prefix), int(time.time())
    inputs = body.inputs
    require_sequences(context.config, len(inputs), param="input")
    work = context.engine.embed(inputs, body.pooling_params(), add_special_tokens=body.add_special_tokens is not False)
    with context.metrics.request() as timer:
        outputs = await until_disconnect(request.receive, work)
        usage = token_usage(outputs)
        timer.finish(num_prompt_tokens=usage["prompt_tokens"], scheduled_at=outputs[0].scheduled_at)
    answer = {
        "id": request_id,
        "object": "list",
        "created": created,
        "model": model,
        "data": write(outputs, body.encoding_format),
        "usage": usage,
    }
    return Response(encode_json(answer), media_type="application/json")
