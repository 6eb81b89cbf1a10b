"""The KV cache as paged tensors over an arena: block-major, so that memory is touched only as blocks are used."""

from __future__ import annotations

from typing import Protocol

import torch


class TensorArena(Protocol):
    """What is needed of an arena: a tensor over a part of it."""

    def view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of `shape` whose first byte is at `offset`."""
        ...


def kv_bytes_per_token(*, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in all layers."""
    return num_layers * 2 * num_kv_heads * head_dim * dtype.itemsize


class KVCache:
    """Keys and values of all layers: one view [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim].

    Slots number tokens: slot = block_id * block_size + offset. Nothing is read or written at construction.
    """

    def __init__(
        self,
        arena: TensorArena,
        *,
        num_blocks: int,
        num_layers: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        shape = (num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim)
        self.blocks = arena.view(0, shape, dtype)
        self._rows = self.blocks.view(-1, num_kv_heads, head_dim)
        self.num_blocks = num_blocks
        self.num_layers = num_layers
        self.block_size = block_size

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block in all layers: what `Arena.reserve` must be given per block."""
        return self.blocks[0].nbytes

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, strided views [num_blocks, block_size, num_kv_heads, head_dim]."""
        return self.blocks[:, index, 0], self.blocks[:, index, 1]

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        """Store one layer's new keys and values, both [num_tokens, num_kv_heads, head_dim], at `slots` [num_tokens]."""
        self.write_rows(layer, keys, values, self.rows(slots))

    def rows(self, slots: torch.Tensor) -> torch.Tensor:
        """Where the keys of layer 0 stand for `slots`; computed once per step, for `write_rows` of every layer."""
        block_rows = self.num_layers * 2 * self.block_size
        return slots.div(self.block_size, rounding_mode="floor") * block_rows + slots % self.block_size

    def write_rows(self, layer: int, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor) -> None:
        """As `write`, at places computed by `rows`."""
        shifted = rows + layer * 2 * self.block_size
        self._rows.index_copy_(0, shifted, keys)
        self._rows.index_copy_(0, shifted + self.block_size, values)
