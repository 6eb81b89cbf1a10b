"""POST /v1/embeddings, /pooling, /score and /rerank: OpenAI's, Cohere's and Jina's shapes, with vLLM's extra fields.

Knows nothing of how vectors or scores are made. As with generation, a field is used, known to be harmless, or refused.
"""

from __future__ import annotations

import time
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from shuteye.errors import InvalidRequest
from shuteye.server.context import Context, ServerContext
from shuteye.server.generation.answer import new_request_id
from shuteye.server.generation.chunks import encode_json
from shuteye.server.http.admission import ModelRoute, needs_task, require_characters, require_sequences
from shuteye.server.http.events import until_disconnect
from shuteye.server.openai.fields import Many, one_message, settle_unsupported
from shuteye.tasks.pool.inputs import as_list
from shuteye.tasks.pool.requests import EmbeddingOutput, EmbeddingRequestOutput, PoolingParams, ScoringRequestOutput

UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "cache_salt": (), "chat_template": (), "chat_template_kwargs": (), "embed_dtype": ("float32",),
    "endianness": ("native", "little"), "instruction": (), "items": (), "label_token_ids": (),
    "max_chunks_per_doc": (), "max_tokens_per_doc": (), "messages": (), "mm_processor_kwargs": ({},),
    "priority": (0,), "rank_fields": (["text"],), "task": (), "truncation_side": ("right",),
}  # fmt: skip
"""Fields that would change the answer, each with the values that ask for nothing; null is always one."""

Text = str | Many[str]


class PoolingFields(BaseModel):
    """Fields of all of these routes; None means that the caller did not say."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1)
    use_activation: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _settle_unsupported(cls, body: Any) -> Any:
        return settle_unsupported(body, cls.model_fields, unsupported=UNSUPPORTED)

    def pooling_params(self) -> PoolingParams:
        """What the caller said.

        Raises:
            InvalidRequest: a value is out of range.
        """
        return PoolingParams(truncate_prompt_tokens=self.truncate_prompt_tokens, use_activation=self.use_activation)


# --- embeddings -----------------------------------------------------------------------------------


class EmbeddingBody(PoolingFields):
    """POST /v1/embeddings."""

    input: str | Many[str] | Many[int] | Many[Many[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    add_special_tokens: bool | None = None

    _input_message = field_validator("input", mode="wrap")(
        one_message("a string, a list of strings, a list of token ids, or a list of those")
    )

    @property
    def inputs(self) -> list[str | Sequence[int]]:
        """One or more, however they were given.

        Raises:
            InvalidRequest: there is none.
        """
        if isinstance(self.input, str):
            return [self.input]
        if not self.input:
            raise InvalidRequest("The input is empty; send at least one text.", param="input")
        if isinstance(self.input[0], int):
            return [self.input]  # one list of ids
        return list(self.input)  # texts, or lists of ids

    def pooling_params(self) -> PoolingParams:
        """What the caller said.

        Raises:
            InvalidRequest: a value is out of range.
        """
        return PoolingParams(self.dimensions, self.truncate_prompt_tokens, self.use_activation)


class PoolingBody(EmbeddingBody):
    """POST /pooling: the same, with a task that can only be this one."""

    task: Literal["embed"] | None = None


def write_vector(output: EmbeddingOutput, encoding: str | None) -> list[float] | str:
    """Numbers, or their float32 bytes in base64."""
    return b64encode(output.data).decode() if encoding == "base64" else output.embedding


def embedding_data(outputs: Sequence[EmbeddingRequestOutput], encoding: str | None) -> list[dict[str, Any]]:
    """OpenAI's `data` of embeddings."""
    return [
        {"object": "embedding", "index": index, "embedding": write_vector(output.outputs, encoding)}
        for index, output in enumerate(outputs)
    ]


def pooling_data(outputs: Sequence[EmbeddingRequestOutput], encoding: str | None) -> list[dict[str, Any]]:
    """The `data` of /pooling (vLLM's shape)."""
    return [
        {"object": "pooling", "index": index, "data": write_vector(output.outputs, encoding)}
        for index, output in enumerate(outputs)
    ]


# --- scores ---------------------------------------------------------------------------------------

_PAIRS = (("text_1", "text_2"), ("queries", "documents"), ("data_1", "data_2"))
"""The names that vLLM gives to both sides."""


class ScoreBody(PoolingFields):
    """POST /score and /v1/score: one pair of these fields, each a text or a list of texts."""

    text_1: Text | None = None
    text_2: Text | None = None
    queries: Text | None = None
    documents: Text | None = None
    data_1: Text | None = None
    data_2: Text | None = None

    _text_message = field_validator("text_1", "text_2", "queries", "documents", "data_1", "data_2", mode="wrap")(
        one_message("a string or a list of strings")
    )

    @property
    def sides(self) -> tuple[Text, Text]:
        """What is compared with what.

        Raises:
            InvalidRequest: not exactly one of the pairs of fields was given.
        """
        given = [(getattr(self, one), getattr(self, other)) for one, other in _PAIRS]
        named = [pair for pair in given if pair != (None, None)]
        if len(named) != 1 or None in named[0]:
            pairs = ", or ".join(f"{one} and {other}" for one, other in _PAIRS)
            raise InvalidRequest(f"Send exactly one pair of fields: {pairs}.", param="text_1")
        return named[0]


def score_data(outputs: Sequence[ScoringRequestOutput]) -> list[dict[str, Any]]:
    """The `data` of scores (vLLM's shape)."""
    return [{"index": index, "object": "score", "score": output.outputs.score} for index, output in enumerate(outputs)]


# --- ranking --------------------------------------------------------------------------------------


class RankedDocument(BaseModel):
    """A document as an object, as Cohere and Jina clients may send it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    text: str


class RerankBody(PoolingFields):
    """POST /rerank, /v1/rerank and /v2/rerank; `top_n` 0 or null keeps all."""

    query: str
    documents: Many[str | RankedDocument] = Field(min_length=1)
    top_n: int | None = Field(default=None, ge=0)
    return_documents: bool | None = None

    _documents_message = field_validator("documents", mode="wrap")(
        one_message("a non-empty list of strings, or of objects with a text")
    )

    @property
    def texts(self) -> list[str]:
        """The documents' texts."""
        return [each if isinstance(each, str) else each.text for each in self.documents]


def rerank_results(
    outputs: Sequence[ScoringRequestOutput], texts: Sequence[str], *, top_n: int | None, with_texts: bool
) -> list[dict[str, Any]]:
    """`results`, the best first; of equals, the one that was sent first."""
    ranked = sorted(range(len(outputs)), key=lambda index: -outputs[index].outputs.score)
    return [
        {
            "index": index,
            **({"document": {"text": texts[index]}} if with_texts else {}),
            "relevance_score": outputs[index].outputs.score,
        }
        for index in ranked[: top_n or None]
    ]


def token_usage(outputs: Sequence[EmbeddingRequestOutput | ScoringRequestOutput]) -> dict[str, Any]:
    """OpenAI's `usage`; nothing is generated."""
    count = sum(len(output.prompt_token_ids) for output in outputs)
    return {"prompt_tokens": count, "total_tokens": count, "completion_tokens": 0}


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
