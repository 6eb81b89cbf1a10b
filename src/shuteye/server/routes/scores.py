"""POST /score and /rerank, under all of their names.

Knows nothing of how scores are made: by a cross-encoder, or as the cosine of two embeddings.
"""

from __future__ import annotations

import time

from fastapi import APIRouter, Request, Response

from shuteye.engine.pooling import as_list
from shuteye.outputs import ScoringRequestOutput
from shuteye.server.admission import ModelRoute, needs_task
from shuteye.server.answer import new_request_id
from shuteye.server.budget import require_characters, require_sequences
from shuteye.server.context import Context, ServerContext
from shuteye.server.disconnect import until_disconnect
from shuteye.server.protocol.chunks import encode_json
from shuteye.server.protocol.pooling import (
    PoolingFields,
    RerankBody,
    ScoreBody,
    Text,
    rerank_results,
    score_data,
    token_usage,
)

router = APIRouter(route_class=ModelRoute)

SCORES = [needs_task("score", "embed")]


@router.post("/score", response_model=None, dependencies=SCORES)
@router.post("/v1/score", response_model=None, dependencies=SCORES)
async def score(request: Request, body: ScoreBody, context: Context) -> Response:
    """Scores how well each text goes with another."""
    request_id, created = new_request_id("score"), int(time.time())
    outputs = await _scores(request, context, body, *body.sides)
    answer = {
        "id": request_id,
        "object": "list",
        "created": created,
        "model": context.served_name(body.model),
        "data": score_data(outputs),
        "usage": token_usage(outputs),
    }
    return Response(encode_json(answer), media_type="application/json")


@router.post("/rerank", response_model=None, dependencies=SCORES)
@router.post("/v1/rerank", response_model=None, dependencies=SCORES)
@router.post("/v2/rerank", response_model=None, dependencies=SCORES)
async def rerank(request: Request, body: RerankBody, context: Context) -> Response:
    """Orders documents by how well they answer a query, the best first."""
    request_id, texts = new_request_id("rerank"), body.texts
    outputs = await _scores(request, context, body, body.query, texts)
    with_texts = body.return_documents is not False
    answer = {
        "id": request_id,
        "model": context.served_name(body.model),
        "usage": token_usage(outputs),
        "results": rerank_results(outputs, texts, top_n=body.top_n, with_texts=with_texts),
    }
    return Response(encode_json(answer), media_type="application/json")


async def _scores(
    request: Request, context: ServerContext, body: PoolingFields, one: Text, other: Text
) -> list[ScoringRequestOutput]:
    context.served_name(body.model)  # an unknown one is refused before anything is computed
    _require_affordable(context, as_list(one), as_list(other))
    work = context.engine.score(one, other, body.pooling_params())
    with context.metrics.request() as timer:
        outputs = await until_disconnect(request.receive, work)
        count = sum(len(output.prompt_token_ids) for output in outputs)
        timer.finish(num_prompt_tokens=count, scheduled_at=outputs[0].scheduled_at)
    return outputs


def _require_affordable(context: ServerContext, queries: list[str], documents: list[str]) -> None:
    """A model that reads pairs has a single query encoded once for every document."""
    require_sequences(context.config, max(len(queries), len(documents)), param="documents")
    times = len(documents) if len(queries) == 1 and context.engine.info.task == "score" else 1
    require_characters(sum(map(len, queries)) * times + sum(map(len, documents)), param="documents")
