"""The KV cache over an arena: block-major, so that memory is touched only as blocks are used. No torch."""

from __future__ import annotations

import ctypes
from typing import Protocol

from shuteye.cache.kv_layout import KVLayout


class BytesArena(Protocol):
    """What is needed of an arena: a part of it as bytes."""

    def bytes_view(self, offset: int, nbytes: int) -> memoryview:
        """Bytes [offset, offset + nbytes), writable."""
        ...


class KVCache:
    """Keys and values of all layers, in blocks of one layout.

    Slots number tokens: slot = block_id * block_size + offset. Nothing is read or written at construction.

    Attributes:
        content: its bytes; keeps the addresses alive, not the memory.
        address: where they begin.
    """

    def __init__(self, arena: BytesArena, layout: KVLayout, *, num_blocks: int) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.content = arena.bytes_view(0, num_blocks * layout.bytes_per_block)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.content))
