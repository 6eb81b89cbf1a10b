"""What a caller asks of a model that embeds or scores, validated once, and what comes of it. Plain data; no torch."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import msgspec

from shuteye.typed_fields import require, settle_types


class PooledDelta(msgspec.Struct, frozen=True, tag=True):
    """All that a `PoolRequest` asked for; it ends the request. `rows` are float32, one per input, in their order."""

    request_id: str
    rows: tuple[bytes, ...]


# --- embeddings and scores ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PooledOutput:
    """What came of one `PoolRequest`: a row of float32 per input, in order; `scheduled_at` as in RequestOutput."""

    request_id: str
    rows: tuple[bytes, ...]
    finished: bool = True
    scheduled_at: float | None = None


@dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    """One embedding, as the bytes of its float32 numbers in this machine's order."""

    data: bytes

    @property
    def embedding(self) -> list[float]:
        """The numbers."""
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
class PoolingParams:
    """What is made of an input that is embedded or scored; field meanings as in vLLM's PoolingParams.

    Attributes:
        dimensions: how many numbers of an embedding are wanted; None means all.
        truncate_prompt_tokens: cut texts to so many tokens, -1 to the context; None refuses what is too long.
        use_activation: whether embeddings are normalised and scores go through the checkpoint's activation; None means
            what the checkpoint says.

    Raises:
        InvalidRequest: a value is of another type or out of range; `param` names it.
    """

    dimensions: int | None = None
    truncate_prompt_tokens: int | None = None
    use_activation: bool | None = None

    def __post_init__(self) -> None:
        settle_types(self)
        require(self.dimensions is None or self.dimensions >= 1, "dimensions", "at least 1", self.dimensions)
        limit = self.truncate_prompt_tokens
        require(limit is None or limit == -1 or limit >= 1, "truncate_prompt_tokens", "-1 or at least 1", limit)


class PoolInput(msgspec.Struct, frozen=True):
    """One text, or one pair of texts, as ids. `type_ids` tell the texts of a pair apart; empty means all zero."""

    token_ids: tuple[int, ...]
    type_ids: tuple[int, ...] = ()


class PoolRequest(msgspec.Struct, frozen=True, tag=True):
    """What one caller wants embedded or scored: one row of numbers per input, all of them at once."""

    request_id: str
    inputs: tuple[PoolInput, ...]
    params: PoolingParams = msgspec.field(default_factory=PoolingParams)
