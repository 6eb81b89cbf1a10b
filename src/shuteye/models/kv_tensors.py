"""The KV cache as torch tensors, for attention that torch computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shuteye.models.tensors import over, torch_dtype

if TYPE_CHECKING:
    from shuteye.cache.kv_cache import KVCache

_LEAST_MAGNITUDE = 1e-30
"""Of a head that is told from zero: 127 over anything smaller would not be finite."""


class KVTensors:
    """Views of a cache, all strided.

    Attributes:
        numbers: [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim] of the cache's dtype.
        scales: [num_blocks, num_layers, 2, num_kv_heads, block_size] float32, of a cache that has them.
    """

    def __init__(self, cache: KVCache) -> None:
        self.layout = layout = cache.layout
        halves = (cache.num_blocks, layout.num_layers, 2)
        in_bytes = over(cache.content, (*halves, layout.half_nbytes), "uint8")
        numbers = in_bytes[..., : layout.numbers_nbytes].view(torch_dtype(layout.dtype))
        self.numbers = numbers.view(*halves, layout.block_size, layout.num_kv_heads, layout.head_dim)
        self.scales: Tensor | None = None
        if layout.has_scales:
            scales = in_bytes.view(torch.float32)[..., layout.numbers_nbytes // 4 :]
            self.scales = scales.view(*halves, layout.num_kv_heads, layout.block_size)

    def room(self, num_blocks: int) -> Tensor:
        """What `read` of so many blocks may fill."""
        layout = self.layout
        return self.numbers.new_empty((num_blocks, layout.block_size, layout.num_kv_heads, layout.head_dim))

    def read(self, layer: int, half: int, block_ids: Tensor, *, past_end: Tensor, room: Tensor) -> Tensor:
        """The keys (half 0) or values (half 1) of blocks, one after the other: [num_tokens, num_kv_heads, head_dim].

        Args:
            past_end: indices of tokens that are zero, whatever the cache holds there.

        Returns:
            numbers of the cache's dtype, in `room`; or of float32, if it has scales.
        """
        found = torch.index_select(self.numbers[:, layer, half], 0, block_ids, out=room).flatten(0, 1)
        if self.scales is not None:
            scales = self.scales[:, layer, half].index_select(0, block_ids)  # [num_blocks, num_kv_heads, block_size]
            found = found * scales.transpose(1, 2).flatten(0, 1)[..., None]
        return found.index_fill_(0, past_end, 0) if past_end.numel() else found

    def write(self, layer: int, keys: Tensor, values: Tensor, places: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values, both [num_tokens, num_kv_heads, head_dim].

        Args:
            places: of each token, as `places` gives them.

        Returns:
            both as reading them gives them back, in the dtype that they came in.
        """
        return self._write_half(layer, 0, keys, places), self._write_half(layer, 1, values, places)

    def places(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks of slots, and offsets in them; computed once per step, for `write` of every layer."""
        size = self.layout.block_size
        return slots.div(size, rounding_mode="floor"), slots % size

    def _write_half(self, layer: int, half: int, new: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
        blocks, offsets = places
        target = self.numbers[:, layer, half]
        if self.scales is None:
            kept = _kept(new, target.dtype)
            target[blocks, offsets] = kept
            return kept.to(new.dtype)
        numbers, scales = quantized(new)
        target[blocks, offsets] = numbers
        self.scales[:, layer, half].transpose(1, 2)[blocks, offsets] = scales
        return (numbers * scales[..., None]).to(new.dtype)


def quantized(new: Tensor) -> tuple[Tensor, Tensor]:
    """Heads [..., head_dim] as int8, and their scales [...]; what the native kernels write, bit for bit.

    A head with a number that is not finite has a scale of NaN.
    """
    numbers = new.float()
    magnitudes = numbers.abs().amax(-1)
    finite = magnitudes.isfinite()  # of NaN, amax is NaN
    used = finite & (magnitudes >= _LEAST_MAGNITUDE)
    factors = torch.where(used, 127.0 / magnitudes, 0.0)
    whole = torch.where(used[..., None], (numbers * factors[..., None]).round(), 0.0)
    scales = torch.where(finite, torch.where(used, magnitudes / 127.0, 0.0), torch.nan)
    return whole.to(torch.int8), scales


def _kept(new: Tensor, dtype: torch.dtype) -> Tensor:
    """As the cache holds it: in half precision, what is too large becomes the largest."""
    if dtype == torch.float16:
        largest = torch.finfo(torch.float16).max
        new = new.clamp(-largest, largest)
    return new.to(dtype)
