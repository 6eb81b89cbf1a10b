"""What a caller asks of a model that embeds, scores or classifies, and what comes of it. Plain data; no torch."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Literal

import msgspec

from shuteye.typed_fields import require, settle_types

EmbedDtype = Literal["float32", "float16", "bfloat16", "fp8_e4m3", "fp8_e5m2"]
"""What the numbers of an embedding may be encoded as; vLLM's names."""


class PooledDelta(msgspec.Struct, frozen=True, tag=True):
    """All that a `PoolRequest` asked for; it ends the request. `rows` are one per input, in their order."""

    request_id: str
    rows: tuple[bytes, ...]


# --- embeddings, scores, classes ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PooledOutput:
    """What came of one `PoolRequest`: a row of numbers per input, in order; `scheduled_at` as in RequestOutput."""

    request_id: str
    rows: tuple[bytes, ...]
    finished: bool = True
    scheduled_at: float | None = None


@dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    """One embedding, as the bytes of its numbers in this machine's order; `dtype` is `PoolingParams.embed_dtype`."""

    data: bytes
    dtype: EmbedDtype = "float32"

    @property
    def embedding(self) -> list[float]:
        """The numbers.

        Raises:
            InvalidRequest: they are not float32; then `data` alone has them.
        """
        require(
            self.dtype == "float32", "embed_dtype", "'float32' for numbers; others are bytes, in `data`", self.dtype
        )
        return array("f", self.data).tolist()


@dataclass(frozen=True, slots=True)
class EmbeddingRequestOutput:
    """The embedding of one prompt (vLLM's shape)."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    outputs: EmbeddingOutput
    finished: bool = True
    scheduled_at: float | None = None


@dataclass(frozen=True, slots=True)
class ScoringOutput:
    """How well two texts go together."""

    score: float


@dataclass(frozen=True, slots=True)
class ScoringRequestOutput:
    """The score of one pair (vLLM's shape). For an embedding model `prompt_token_ids` are both texts', in turn."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    outputs: ScoringOutput
    finished: bool = True
    scheduled_at: float | None = None


@dataclass(frozen=True, slots=True)
class ClassificationOutput:
    """What a text is. `probs` has a number per class, and `label` is the name of the one with the largest."""

    probs: list[float]
    label: str | None = None

    @property
    def num_classes(self) -> int:
        """How many there are."""
        return len(self.probs)


@dataclass(frozen=True, slots=True)
class ClassificationRequestOutput:
    """The classes of one prompt (vLLM's shape)."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    outputs: ClassificationOutput
    finished: bool = True
    scheduled_at: float | None = None


@dataclass(frozen=True, slots=True)
class PoolingParams:
    """What is made of an input that is embedded, scored or classified; field meanings as in vLLM's PoolingParams.

    Attributes:
        dimensions: how many numbers of an embedding are wanted; None means all.
        truncate_prompt_tokens: cut texts to so many tokens, -1 to the context; None refuses what is too long.
        use_activation: whether embeddings are normalised and logits go through the checkpoint's activation; None means
            what the checkpoint says.
        truncation_side: which end of a text is cut off.
        padding: "max_length" fills every input up to `truncate_prompt_tokens`, else to the context, with the
            tokenizer's padding token, which the model reads like any other: for models trained without a mask.
        max_tokens_per_query, max_tokens_per_doc: cut queries and documents of scores to so many tokens, special ones
            aside; 0 does not.
        embed_dtype: the numbers of an embedding's `data`.

    Raises:
        InvalidRequest: a value is of another type or out of range; `param` names it.
    """

    dimensions: int | None = None
    truncate_prompt_tokens: int | None = None
    use_activation: bool | None = None
    truncation_side: Literal["left", "right"] = "right"
    padding: Literal["max_length", "do_not_pad"] | None = None
    max_tokens_per_query: int = 0
    max_tokens_per_doc: int = 0
    embed_dtype: EmbedDtype = "float32"

    def __post_init__(self) -> None:
        settle_types(self)
        require(self.dimensions is None or self.dimensions >= 1, "dimensions", "at least 1", self.dimensions)
        limit = self.truncate_prompt_tokens
        require(limit is None or limit == -1 or limit >= 1, "truncate_prompt_tokens", "-1 or at least 1", limit)
        for name in ("max_tokens_per_query", "max_tokens_per_doc"):
            require(getattr(self, name) >= 0, name, "a non-negative integer", getattr(self, name))


class PoolInput(msgspec.Struct, frozen=True):
    """One text, or one pair of texts, as ids. `type_ids` tell the texts of a pair apart; empty means all zero."""

    token_ids: tuple[int, ...]
    type_ids: tuple[int, ...] = ()


class PoolRequest(msgspec.Struct, frozen=True, tag=True):
    """What one caller wants embedded or scored: one row of numbers per input, all of them at once."""

    request_id: str
    inputs: tuple[PoolInput, ...]
    params: PoolingParams = msgspec.field(default_factory=PoolingParams)
