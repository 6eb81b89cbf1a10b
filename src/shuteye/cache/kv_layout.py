"""How keys and values lie in a block of the KV cache: in which numbers, and how many bytes that takes. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shuteye.errors import InvalidRequest
from shuteye.memory.layout import DTYPE_NBYTES

SCALE_NBYTES = 4
"""A float32."""

EPS: Mapping[str, float] = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10, "int8": 2.0**-7}
"""Dtypes that a cache may have, and the distance between their neighbours, relative to the largest number of a head."""

INT8_LARGEST_HEAD_DIM = 512
"""Sums of as many products of int8 and int16 fit 32 bits."""


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The blocks of one rank's cache. For each layer keys, then values, each a half:

        numbers  [block_size, num_kv_heads, head_dim] of `dtype`
        scales   [num_kv_heads, block_size] float32, of int8 alone; key or value = number * scale

    A block has all that reading it takes, so that sharing one shares its scales.

    Attributes:
        dtype: one of `EPS`.

    Raises:
        InvalidRequest: heads that int8 cannot hold.
    """

    num_layers: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: str

    def __post_init__(self) -> None:
        assert self.dtype in EPS, f"no KV cache holds {self.dtype}"
        if self.has_scales and (self.head_dim % SCALE_NBYTES or self.head_dim > INT8_LARGEST_HEAD_DIM):
            raise InvalidRequest(
                f"kv_cache_dtype int8 needs heads of a multiple of {SCALE_NBYTES} and at most {INT8_LARGEST_HEAD_DIM} "
                f"numbers; this model's have {self.head_dim}. Leave it at 'auto'.",
                param="kv_cache_dtype",
            )

    @property
    def has_scales(self) -> bool:
        """Whether numbers must be multiplied by scales."""
        return self.dtype == "int8"

    @property
    def numbers_nbytes(self) -> int:
        """Of a half."""
        return self.block_size * self.num_kv_heads * self.head_dim * DTYPE_NBYTES[self.dtype]

    @property
    def half_nbytes(self) -> int:
        """The keys, or the values, of a layer in one block."""
        scales = self.block_size * self.num_kv_heads * SCALE_NBYTES if self.has_scales else 0
        return self.numbers_nbytes + scales

    @property
    def bytes_per_block(self) -> int:
        """All layers of a block."""
        return self.num_layers * 2 * self.half_nbytes

    @property
    def bytes_per_token(self) -> int:
        """All layers of a token."""
        return self.bytes_per_block // self.block_size


def cache_dtype(asked: str, model_dtype: str) -> str:
    """The dtype of the cache of a model: what `EngineConfig.kv_cache_dtype` asks for, which may be `auto`."""
    return model_dtype if asked == "auto" else asked
