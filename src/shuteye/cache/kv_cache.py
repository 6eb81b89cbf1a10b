"""The KV cache over an arena: block-major, so that memory is touched only as blocks are used. No torch."""

from __future__ import annotations

import ctypes
from typing import Protocol

from shuteye.memory.layout import DTYPE_NBYTES, tensor_nbytes


class BytesArena(Protocol):
    """What is needed of an arena: a part of it as bytes."""

    def bytes_view(self, offset: int, nbytes: int) -> memoryview:
        """Bytes [offset, offset + nbytes), writable."""
        ...


def kv_bytes_per_token(*, num_layers: int, num_kv_heads: int, head_dim: int, dtype: str) -> int:
    """Bytes of one token's keys and values in all layers."""
    return num_layers * 2 * num_kv_heads * head_dim * DTYPE_NBYTES[dtype]


class KVCache:
    """Keys and values of all layers: [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim] of one dtype.

    Slots number tokens: slot = block_id * block_size + offset. Nothing is read or written at construction.

    Attributes:
        content: its bytes; keeps the addresses alive, not the memory.
        address: where they begin.
    """

    def __init__(
        self,
        arena: BytesArena,
        *,
        num_blocks: int,
        num_layers: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: str,
    ) -> None:
        self.shape = (num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim)
        self.dtype = dtype
        self.content = arena.bytes_view(0, tensor_nbytes(self.shape, dtype))
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.content))
        self.num_blocks = num_blocks
        self.num_layers = num_layers
        self.block_size = block_size

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block in all layers: what `Arena.reserve` must be given per block."""
        return self.content.nbytes // self.num_blocks
