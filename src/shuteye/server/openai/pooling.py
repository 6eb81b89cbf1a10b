"""POST /v1/embeddings, /pooling, /score and /rerank: OpenAI's, Cohere's and Jina's shapes, with vLLM's extra fields.

As with generation, a field is used, known to be harmless, or refused.
"""

from __future__ import annotations

import time
from base64 import b64encode
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from msgspec import UNSET, Struct, UnsetType
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from shuteye.errors import InvalidRequest
from shuteye.server.context import Context, ServerContext
from shuteye.server.generation.answer import new_request_id
from shuteye.server.http.admission import ModelRoute, needs_task, require_characters, require_sequences
from shuteye.server.http.answers import JsonAnswer
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


class EmbeddingDatum(Struct):
    """One vector: numbers, or base64 of their float32 bytes."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class PoolingDatum(Struct):
    """One vector: numbers, or base64 of their float32 bytes."""

    object: Literal["pooling"]
    index: int
    data: list[float] | str


class PoolingUsage(Struct):
    """Token counts of one request; nothing is generated."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0


class EmbeddingAnswer(Struct, kw_only=True):
    """POST /v1/embeddings (OpenAI's shape)."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[EmbeddingDatum]
    usage: PoolingUsage


class PoolingAnswer(Struct, kw_only=True):
    """POST /pooling (vLLM's shape)."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[PoolingDatum]
    usage: PoolingUsage


def _vector(output: EmbeddingOutput, encoding: str | None) -> list[float] | str:
    return b64encode(output.data).decode() if encoding == "base64" else output.embedding


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


class ScoreDatum(Struct):
    """How well two texts go together."""

    index: int
    object: Literal["score"]
    score: float


class ScoreAnswer(Struct, kw_only=True):
    """POST /score (vLLM's shape)."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[ScoreDatum]
    usage: PoolingUsage


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


class DocumentAnswer(Struct):
    """A document's text."""

    text: str


class RankedAnswer(Struct, kw_only=True):
    """One document, by its place in the request; its text unless `return_documents` is false."""

    index: int
    document: DocumentAnswer | UnsetType = UNSET
    relevance_score: float


class RerankAnswer(Struct):
    """POST /rerank (Cohere's and Jina's shape); the best first."""

    id: str
    model: str
    usage: PoolingUsage
    results: list[RankedAnswer]


def _ranked(outputs: Sequence[ScoringRequestOutput], body: RerankBody, texts: Sequence[str]) -> list[RankedAnswer]:
    """The best first; of equals, the one that was sent first."""
    scores = [output.outputs.score for output in outputs]
    best = sorted(range(len(scores)), key=lambda index: -scores[index])[: body.top_n or None]
    ranked = [RankedAnswer(index=index, relevance_score=scores[index]) for index in best]
    if body.return_documents is not False:
        for each in ranked:
            each.document = DocumentAnswer(texts[each.index])
    return ranked


# --- routes ---------------------------------------------------------------------------------------


def _usage(outputs: Sequence[EmbeddingRequestOutput | ScoringRequestOutput]) -> PoolingUsage:
    count = sum(len(output.prompt_token_ids) for output in outputs)
    return PoolingUsage(count, count)


router = APIRouter(route_class=ModelRoute)


@router.post("/v1/embeddings", response_model=None, dependencies=[needs_task("embed")])
async def embeddings(request: Request, body: EmbeddingBody, context: Context) -> Response:
    """Embeds one or more texts."""
    model, request_id, created = context.served_name(body.model), new_request_id("embd"), int(time.time())
    outputs = await _embedded(request, body, context)
    data = [
        EmbeddingDatum("embedding", index, _vector(output.outputs, body.encoding_format))
        for index, output in enumerate(outputs)
    ]
    return JsonAnswer(EmbeddingAnswer(id=request_id, created=created, model=model, data=data, usage=_usage(outputs)))


@router.post("/pooling", response_model=None, dependencies=[needs_task("embed")])
async def pooling(request: Request, body: PoolingBody, context: Context) -> Response:
    """Embeds one or more texts, and answers in vLLM's shape."""
    model, request_id, created = context.served_name(body.model), new_request_id("pool"), int(time.time())
    outputs = await _embedded(request, body, context)
    data = [
        PoolingDatum("pooling", index, _vector(output.outputs, body.encoding_format))
        for index, output in enumerate(outputs)
    ]
    return JsonAnswer(PoolingAnswer(id=request_id, created=created, model=model, data=data, usage=_usage(outputs)))


async def _embedded(request: Request, body: EmbeddingBody, context: ServerContext) -> list[EmbeddingRequestOutput]:
    inputs = body.inputs
    require_sequences(context.config, len(inputs), param="input")
    work = context.engine.embed(inputs, body.pooling_params(), add_special_tokens=body.add_special_tokens is not False)
    with context.metrics.request() as timer:
        outputs = await until_disconnect(request.receive, work)
        timer.finish(num_prompt_tokens=_usage(outputs).prompt_tokens, scheduled_at=outputs[0].scheduled_at)
    return outputs


SCORES = [needs_task("score", "embed")]


@router.post("/score", response_model=None, dependencies=SCORES)
@router.post("/v1/score", response_model=None, dependencies=SCORES)
async def score(request: Request, body: ScoreBody, context: Context) -> Response:
    """Scores how well each text goes with another."""
    request_id, created = new_request_id("score"), int(time.time())
    outputs = await _scores(request, context, body, *body.sides)
    model, usage = context.served_name(body.model), _usage(outputs)
    data = [ScoreDatum(index, "score", output.outputs.score) for index, output in enumerate(outputs)]
    return JsonAnswer(ScoreAnswer(id=request_id, created=created, model=model, data=data, usage=usage))


@router.post("/rerank", response_model=None, dependencies=SCORES)
@router.post("/v1/rerank", response_model=None, dependencies=SCORES)
@router.post("/v2/rerank", response_model=None, dependencies=SCORES)
async def rerank(request: Request, body: RerankBody, context: Context) -> Response:
    """Orders documents by how well they answer a query, the best first."""
    request_id, texts = new_request_id("rerank"), body.texts
    outputs = await _scores(request, context, body, body.query, texts)
    model, usage = context.served_name(body.model), _usage(outputs)
    return JsonAnswer(RerankAnswer(request_id, model, usage, _ranked(outputs, body, texts)))


async def _scores(
    request: Request, context: ServerContext, body: PoolingFields, one: Text, other: Text
) -> list[ScoringRequestOutput]:
    context.served_name(body.model)  # an unknown one is refused before anything is computed
    _require_affordable(context, as_list(one), as_list(other))
    work = context.engine.score(one, other, body.pooling_params())
    with context.metrics.request() as timer:
        outputs = await until_disconnect(request.receive, work)
        timer.finish(num_prompt_tokens=_usage(outputs).prompt_tokens, scheduled_at=outputs[0].scheduled_at)
    return outputs


def _require_affordable(context: ServerContext, queries: list[str], documents: list[str]) -> None:
    """A model that reads pairs has a single query encoded once for every document."""
    require_sequences(context.config, max(len(queries), len(documents)), param="documents")
    times = len(documents) if len(queries) == 1 and context.engine.info.task == "score" else 1
    require_characters(sum(map(len, queries)) * times + sum(map(len, documents)), param="documents")
