"""POST /score and /rerank: how well texts go together, in vLLM's shape, and in Cohere's and Jina's."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from msgspec import UNSET, Struct, UnsetType
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from shuteye.errors import InvalidRequest
from shuteye.server.context import Context, ServerContext
from shuteye.server.generation.answer import new_request_id
from shuteye.server.http.admission import ModelRoute, needs_task, require_characters, require_sequences
from shuteye.server.http.answers import JsonAnswer
from shuteye.server.openai.fields import Many, one_message, refuse_other_content
from shuteye.server.openai.pooling import PoolingFields, PoolingUsage, computed, usage_of
from shuteye.tasks.pool.requests import PoolingParams, ScoringRequestOutput


class ContentPart(BaseModel):
    """A part of a text; vLLM's models that see have others."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, part: Any) -> Any:
        refuse_other_content(part, param="content")
        return part


class ScoredContent(BaseModel):
    """A text in parts, which are read as lines."""

    model_config = ConfigDict(extra="forbid", strict=True)

    content: Many[ContentPart] = Field(min_length=1)

    @property
    def text(self) -> str:
        """All of it."""
        return "\n".join(part.text for part in self.content)


class RankedDocument(BaseModel):
    """A document as an object, as Cohere and Jina clients may send it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    text: str


Text = str | ScoredContent
Document = str | RankedDocument | ScoredContent


def _text(given: Document) -> str:
    return given if isinstance(given, str) else given.text


class ScoringFields(PoolingFields):
    """Fields of all routes of this module; 0 tokens cut nothing."""

    max_tokens_per_query: int | None = None
    max_tokens_per_doc: int | None = None

    def scoring_params(self, context: ServerContext) -> PoolingParams:
        """What the caller said.

        Raises:
            InvalidRequest: a value is out of range.
        """
        limits = {"max_tokens_per_query": self.max_tokens_per_query, "max_tokens_per_doc": self.max_tokens_per_doc}
        longest = context.engine.info.max_model_len
        for name, limit in limits.items():
            if limit is not None and limit < 0:
                raise InvalidRequest(f"{name} must be a non-negative integer, got {limit}.", param=name)
        return self.pooling_params(**{name: min(limit or 0, longest) for name, limit in limits.items()})


# --- scores ---------------------------------------------------------------------------------------

_PAIRS = (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))
"""The names that vLLM gives to both sides."""


class ScoreBody(ScoringFields):
    """POST /score and /v1/score: one pair of these fields, each a text or a list of texts."""

    text_1: Text | Many[Text] | None = None
    text_2: Text | Many[Text] | None = None
    queries: Text | Many[Text] | None = None
    documents: Text | Many[Text] | None = None
    items: Text | Many[Text] | None = None
    data_1: Text | Many[Text] | None = None
    data_2: Text | Many[Text] | None = None

    _text_message = field_validator(
        "text_1", "text_2", "queries", "documents", "items", "data_1", "data_2", mode="wrap"
    )(one_message("a string, an object with content, or a list of those"))

    @property
    def sides(self) -> tuple[list[str], list[str]]:
        """What is compared with what.

        Raises:
            InvalidRequest: not exactly one of the pairs of fields was given.
        """
        named = {name for pair in _PAIRS for name in pair if getattr(self, name) is not None}
        pair = next((pair for pair in _PAIRS if set(pair) == named), None)
        if pair is None:
            pairs = ", or ".join(f"{one} and {other}" for one, other in _PAIRS)
            raise InvalidRequest(f"Send exactly one pair of fields: {pairs}.", param="text_1")
        one, other = (_texts(getattr(self, name)) for name in pair)
        return one, other


def _texts(given: Document | Sequence[Document]) -> list[str]:
    return [_text(each) for each in ([given] if isinstance(given, str | BaseModel) else given)]


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


class RerankBody(ScoringFields):
    """POST /rerank, /v1/rerank and /v2/rerank; `top_n` 0 or null keeps all."""

    query: Text
    documents: Document | Many[Document]
    top_n: int | None = Field(default=None, ge=0)
    return_documents: bool | None = None

    _query_message = field_validator("query", mode="wrap")(one_message("a string, or an object with content"))
    _documents_message = field_validator("documents", mode="wrap")(
        one_message("a non-empty list of strings, or of objects with a text")
    )

    @property
    def texts(self) -> list[str]:
        """The documents' texts.

        Raises:
            InvalidRequest: there is none.
        """
        found = _texts(self.documents)
        if not found:
            raise InvalidRequest("documents must not be empty; send at least one.", param="documents")
        return found


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

SCORES = [needs_task("score", "embed")]

router = APIRouter(route_class=ModelRoute)


@router.post("/score", response_model=None, dependencies=SCORES)
@router.post("/v1/score", response_model=None, dependencies=SCORES)
async def score(request: Request, body: ScoreBody, context: Context) -> Response:
    """Scores how well each text goes with another."""
    request_id, created = new_request_id("score"), int(time.time())
    outputs = await _scores(request, context, body, *body.sides)
    model, usage = context.served_name(body.model), usage_of(outputs)
    data = [ScoreDatum(index, "score", output.outputs.score) for index, output in enumerate(outputs)]
    return JsonAnswer(ScoreAnswer(id=request_id, created=created, model=model, data=data, usage=usage))


@router.post("/rerank", response_model=None, dependencies=SCORES)
@router.post("/v1/rerank", response_model=None, dependencies=SCORES)
@router.post("/v2/rerank", response_model=None, dependencies=SCORES)
async def rerank(request: Request, body: RerankBody, context: Context) -> Response:
    """Orders documents by how well they answer a query, the best first."""
    request_id, texts = new_request_id("rerank"), body.texts
    outputs = await _scores(request, context, body, [_text(body.query)], texts)
    model, usage = context.served_name(body.model), usage_of(outputs)
    return JsonAnswer(RerankAnswer(request_id, model, usage, _ranked(outputs, body, texts)))


async def _scores(
    request: Request, context: ServerContext, body: ScoringFields, one: list[str], other: list[str]
) -> list[ScoringRequestOutput]:
    context.served_name(body.model)  # an unknown one is refused before anything is computed
    _require_affordable(context, one, other)
    body.require_affordable_padding(context, len(one) + len(other))
    return await computed(request, context, context.engine.score(one, other, body.scoring_params(context)))


def _require_affordable(context: ServerContext, queries: list[str], documents: list[str]) -> None:
    """A model that reads pairs has a single query encoded once for every document."""
    require_sequences(context.config, max(len(queries), len(documents)), param="documents")
    times = len(documents) if len(queries) == 1 and context.engine.info.task == "score" else 1
    require_characters(sum(map(len, queries)) * times + sum(map(len, documents)), param="documents")
