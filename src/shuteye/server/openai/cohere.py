"""POST /v2/embed: Cohere's shape (https://docs.cohere.com/reference/embed), with what vLLM makes of its fields."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from msgspec import UNSET, Struct, UnsetType, field
from pydantic import BaseModel, ConfigDict, Field, model_validator

from shuteye.errors import InvalidRequest
from shuteye.server.context import Context, ServerContext
from shuteye.server.generation.answer import new_request_id
from shuteye.server.http.admission import ModelRoute, needs_task, require_sequences
from shuteye.server.http.answers import JsonAnswer
from shuteye.server.openai.fields import Many, settle_unsupported
from shuteye.server.openai.pooling import computed, usage_of
from shuteye.server.openai.scores import ScoredContent
from shuteye.server.openai.vectors import VectorFields
from shuteye.tasks.pool.requests import EmbeddingOutput, EmbeddingRequestOutput, PoolingParams

UNSUPPORTED: Mapping[str, tuple[object, ...]] = {"images": (), "priority": (0,)}

PURPOSES = frozenset({"search_document", "search_query", "classification", "clustering"})
"""Cohere's names of what an embedding is for, which its client always sends."""

_LITTLE_ENDIAN = VectorFields(encoding_format="base64", endianness="little")
_SIGNS = bytes(b"01"[byte < 128] for byte in range(256))
"""Of the byte of a float that has its sign: a 1 if it is not negative."""


class CohereBody(BaseModel):
    """POST /v2/embed."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    input_type: str | None = None
    texts: Many[str] | None = None
    inputs: Many[ScoredContent] | None = None
    output_dimension: int | None = None
    embedding_types: Many[Literal["float", "binary", "ubinary", "base64"]] | None = None
    truncate: Literal["NONE", "START", "END"] | None = None
    max_tokens: int | None = Field(default=None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _settle_unsupported(cls, body: Any) -> Any:
        return settle_unsupported(body, cls.model_fields, unsupported=UNSUPPORTED)

    def prompts(self, prefixes: Mapping[str, str]) -> list[str]:
        """The texts, with what the checkpoint puts before those for `input_type`.

        Raises:
            InvalidRequest: not exactly one of the fields is given; or an `input_type` that the model does not know.
        """
        if bool(self.texts) == bool(self.inputs):
            raise InvalidRequest("Send exactly one of texts and inputs, and it must not be empty.", param="texts")
        prefix = self._prefix(prefixes)
        return [prefix + text for text in self.texts or [each.text for each in self.inputs or ()]]

    def _prefix(self, prefixes: Mapping[str, str]) -> str:
        if self.input_type is None or (not prefixes and self.input_type in PURPOSES):
            return ""
        if self.input_type not in prefixes:
            known = ", ".join(sorted(prefixes or PURPOSES))
            raise InvalidRequest(
                f"Unsupported input_type {self.input_type!r}. Supported values: {known}.", param="input_type"
            )
        return prefixes[self.input_type]

    def params(self, max_model_len: int) -> PoolingParams:
        """What the caller said.

        Raises:
            InvalidRequest: a value is out of range.
        """
        if self.output_dimension is not None and self.output_dimension < 1:
            raise InvalidRequest(
                f"output_dimension must be at least 1, got {self.output_dimension}.", param="output_dimension"
            )
        longest = min(self.max_tokens or max_model_len, max_model_len)
        return PoolingParams(
            dimensions=self.output_dimension,
            truncate_prompt_tokens=None if self.truncate == "NONE" else longest,
            truncation_side="left" if self.truncate == "START" else "right",
        )

    def require_as_short(self, outputs: Iterable[EmbeddingRequestOutput]) -> None:
        """Refuse what is longer than `max_tokens` and must not be cut.

        Raises:
            InvalidRequest: says how long it is.
        """
        for output in outputs:
            count = len(output.prompt_token_ids)
            if self.truncate == "NONE" and self.max_tokens is not None and count > self.max_tokens:
                raise InvalidRequest(
                    f"An input has {count} tokens, more than max_tokens={self.max_tokens}; with truncate 'NONE' it is "
                    "not cut. Use 'END' or 'START'.",
                    param="max_tokens",
                )


class EmbeddingsByType(Struct, kw_only=True):
    """The vectors in every type that was asked for."""

    floats: list[list[float]] | UnsetType = field(default=UNSET, name="float")
    binary: list[list[int]] | UnsetType = UNSET
    ubinary: list[list[int]] | UnsetType = UNSET
    base64: list[str] | UnsetType = UNSET


class ApiVersion(Struct):
    """Of Cohere's interface."""

    version: str = "2"


class BilledUnits(Struct):
    """Tokens that were read."""

    input_tokens: int
    image_tokens: int = 0


class CohereMeta(Struct):
    """What else is told of a request."""

    billed_units: BilledUnits
    api_version: ApiVersion = field(default_factory=ApiVersion)


class CohereAnswer(Struct, kw_only=True):
    """POST /v2/embed (Cohere's shape)."""

    id: str
    embeddings: EmbeddingsByType
    texts: list[str] | UnsetType = UNSET
    meta: CohereMeta
    response_type: Literal["embeddings_by_type"] = "embeddings_by_type"


def _by_type(vectors: Sequence[EmbeddingOutput], wanted: Iterable[str]) -> EmbeddingsByType:
    """The vectors in each wanted type; a bit of `binary` is 1 for a number that is not negative."""
    found = EmbeddingsByType()
    for kind in wanted:
        match kind:
            case "float":
                found.floats = [each.embedding for each in vectors]
            case "base64":
                found.base64 = [str(_LITTLE_ENDIAN.written(each)) for each in vectors]
            case "binary":
                found.binary = [[byte - 128 for byte in _signs(each.data)] for each in vectors]
            case "ubinary":
                found.ubinary = [list(_signs(each.data)) for each in vectors]
    return found


def _signs(data: bytes) -> bytes:
    """A bit per float32 of `data`, the first one the highest.

    Raises:
        InvalidRequest: they do not fill whole bytes.
    """
    count = len(data) // 4
    if count % 8:
        raise InvalidRequest(
            f"Embedding dimension must be a multiple of 8 for binary embedding types, but got {count}.",
            param="embedding_types",
        )
    digits = data[3 if sys.byteorder == "little" else 0 :: 4].translate(_SIGNS)
    return int(digits, 2).to_bytes(count // 8, "big")


router = APIRouter(route_class=ModelRoute)


@router.post("/v2/embed", response_model=None, dependencies=[needs_task("embed")])
async def embed(request: Request, body: CohereBody, context: Context) -> Response:
    """Embeds one or more texts, and answers in Cohere's shape."""
    request_id = new_request_id("embd")
    context.served_name(body.model)  # an unknown one is refused before anything is computed
    outputs = await _embedded(request, body, context)
    answer = CohereAnswer(
        id=request_id,
        embeddings=_by_type([each.outputs for each in outputs], body.embedding_types or ["float"]),
        texts=body.texts or UNSET,
        meta=CohereMeta(BilledUnits(usage_of(outputs).prompt_tokens)),
    )
    return JsonAnswer(answer)


async def _embedded(request: Request, body: CohereBody, context: ServerContext) -> list[EmbeddingRequestOutput]:
    info = context.engine.info
    prompts = body.prompts(info.pooling.prompts if info.pooling is not None else {})
    require_sequences(context.config, len(prompts), param="texts")
    outputs = await computed(request, context, context.engine.embed(prompts, body.params(info.max_model_len)))
    body.require_as_short(outputs)
    return outputs
