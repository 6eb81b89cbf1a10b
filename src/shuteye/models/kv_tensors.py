"""The KV cache as torch tensors, for attention that torch computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from shuteye.models.tensors import over

if TYPE_CHECKING:
    from shuteye.cache.kv_cache import KVCache


class KVTensors:
    """Views of a cache: `blocks` [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim], and its layers."""

    def __init__(self, cache: KVCache) -> None:
        self.blocks = over(cache.content, cache.shape, cache.dtype)
        self._rows = self.blocks.view(-1, *cache.shape[-2:])
        self.num_layers = cache.num_layers
        self.block_size = cache.block_size

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
