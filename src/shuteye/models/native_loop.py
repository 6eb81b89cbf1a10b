"""The layers of a packed step by native kernels: from tokens, or the stage before, to logits or the next stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from shuteye.matrices.bfloat16 import Numbers, bfloat16_bits
from shuteye.models.flat_weights import FlatWeights
from shuteye.native import CacheMemory, DecoderSpec, NativeDecoder, NativeGroup, available
from shuteye.native.decoder import DecoderStep, unsupported_shape

if TYPE_CHECKING:
    from shuteye.cache.kv_cache import KVCache
    from shuteye.models.fused import FusedSpec
    from shuteye.tasks.generate.runner import PackedBatch


def rotation(
    frequencies: NDArray[np.float32], scale: float, positions: NDArray[np.int64], dtype: str
) -> tuple[Numbers, Numbers]:
    """Cosines and sines of positions, both [num_tokens, head_dim].

    Args:
        frequencies: [head_dim / 2].
        scale: of both (YaRN's attention factor).
    """
    angles = np.outer(positions.astype(np.float32), frequencies)
    return _of_dtype(np.cos(angles), scale, dtype), _of_dtype(np.sin(angles), scale, dtype)


def _of_dtype(half: NDArray[np.float32], scale: float, dtype: str) -> Numbers:
    scaled = np.concatenate((half, half), axis=1) * np.float32(scale)
    return bfloat16_bits(scaled) if dtype == "bfloat16" else scaled


def cache_memory(kv_cache: KVCache) -> CacheMemory:
    """Where a cache is, and how it lies, as the native kernels take it."""
    layout = kv_cache.layout
    return CacheMemory(
        kv_cache.address,
        layout.dtype,
        kv_cache.num_blocks,
        layout.num_layers,
        layout.block_size,
        layout.num_kv_heads,
        layout.head_dim,
    )


class NativeLoop:
    """A decoder, or a rank's part of one, bound to the cache that it was last called with.

    Args:
        frequencies: inverse frequencies of the rotation, float32 [head_dim / 2].
    """

    def __init__(self, facts: FusedSpec, weights: FlatWeights, frequencies: NDArray[np.float32]) -> None:
        self._facts = facts
        self._weights = weights
        self._frequencies = frequencies
        self._bound: tuple[KVCache, NativeDecoder] | None = None

    @staticmethod
    def computes(facts: FusedSpec, dtype: str) -> bool:
        """Whether the kernels can be used here, and for a model of these sizes."""
        heads = {"num_heads": facts.num_heads, "num_kv_heads": facts.num_kv_heads, "head_dim": facts.head_dim}
        return available() and unsupported_shape(dtype, **heads) is None

    def compute(
        self,
        batch: PackedBatch,
        kv_cache: KVCache,
        *,
        hidden_in: Numbers | None = None,
        group: NativeGroup | None = None,
    ) -> Numbers:
        """What `NativeDecoder.forward` gives; keys and values go to the cache.

        Args:
            hidden_in: [num_tokens, hidden_size], of a part without embeddings.
            group: those who hold the other heads and rows of these layers.
        """
        cos, sin = rotation(self._frequencies, self._facts.rotary_scale, batch.positions, self._weights.dtype)
        step = DecoderStep(
            batch.input_ids,
            cos,
            sin,
            batch.slots,
            batch.query_starts,
            batch.context_lengths,
            batch.block_tables,
            batch.logits_indices,
            hidden_in,
        )
        return self._over(kv_cache).forward(step, group=group)

    def _over(self, kv_cache: KVCache) -> NativeDecoder:
        if self._bound is None or self._bound[0] is not kv_cache:
            self._bound = (kv_cache, NativeDecoder.create(self._spec(kv_cache)))
        return self._bound[1]

    def _spec(self, kv_cache: KVCache) -> DecoderSpec:
        weights, facts = self._weights, self._facts
        return DecoderSpec(
            dtype=weights.dtype,
            layers=weights.layers,
            embedding=weights.embedding,
            final_norm=weights.final_norm,
            head=weights.head,
            num_heads=facts.num_heads,
            eps=facts.norm_eps,
            scale=facts.attention_scale,
            kv_cache=cache_memory(kv_cache),
        )
