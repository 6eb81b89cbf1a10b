"""The layers of a packed step in torch: where the native kernels cannot be used, or are not to be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from shuteye.matrices.bfloat16 import Numbers
from shuteye.models.attention import AttentionContext, attend
from shuteye.models.flat_weights import FlatWeights
from shuteye.models.matrix_product import Product, vector_at
from shuteye.models.tensors import numbers_of, tensor_of, torch_dtype
from shuteye.native import LayerSpec

if TYPE_CHECKING:
    from shuteye.cache.kv_cache import KVCache
    from shuteye.models.fused import FusedSpec
    from shuteye.tasks.generate.runner import PackedBatch


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer, as torch takes it."""

    input_norm: Tensor
    query: Product
    key: Product
    value: Product
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Product
    post_norm: Tensor
    gate: Product
    up: Product
    down: Product

    @classmethod
    def of(cls, layer: LayerSpec, *, hidden_size: int, head_dim: int, native: bool) -> _Layer:
        dtype = layer.query.dtype
        products = {
            name: Product(getattr(layer, name), native=native)
            for name in ("query", "key", "value", "output", "gate", "up", "down")
        }
        input_norm, post_norm = (vector_at(at, hidden_size, dtype) for at in (layer.input_norm, layer.post_norm))
        assert input_norm is not None
        assert post_norm is not None
        return cls(
            input_norm=input_norm,
            post_norm=post_norm,
            query_norm=vector_at(layer.query_norm, head_dim, dtype),
            key_norm=vector_at(layer.key_norm, head_dim, dtype),
            **products,
        )


class TorchLoop:
    """A decoder, or a rank's part of one.

    Args:
        frequencies: inverse frequencies of the rotation, float32 [head_dim / 2].
        windows: per layer, how many positions back a token sees, itself included; None sees all.
        native: whether matrices that torch cannot read may be multiplied by native kernels.
        add_up: sums a layer's output or down projection over those who have a part in it; may change it in place.
    """

    def __init__(
        self,
        facts: FusedSpec,
        weights: FlatWeights,
        frequencies: NDArray[np.float32],
        windows: Sequence[int | None],
        *,
        native: bool,
        add_up: Callable[[Tensor], Tensor] = lambda product: product,
    ) -> None:
        self._facts = facts
        self._memory = weights.memory
        self._frequencies = torch.from_numpy(frequencies)
        self._windows = windows
        self._add_up = add_up
        self._dtype = torch_dtype(weights.dtype)
        self._layers = [
            _Layer.of(layer, hidden_size=weights.hidden_size, head_dim=facts.head_dim, native=native)
            for layer in weights.layers
        ]
        self._embedding = None if weights.embedding is None else Product(weights.embedding, native=native)
        self._norm_weight = vector_at(weights.final_norm, weights.hidden_size, weights.dtype)
        self._head = None if weights.head is None else Product(weights.head, native=native)

    @torch.inference_mode()
    def compute(self, batch: PackedBatch, kv_cache: KVCache, hidden_in: Numbers | None = None) -> Numbers:
        """Hidden states after the layers, or logits of the wanted tokens, in the model's dtype.

        Args:
            hidden_in: [num_tokens, hidden_size], of a part without embeddings; changed in place.
        """
        if hidden_in is not None:
            hidden = tensor_of(hidden_in)
        else:
            assert self._embedding is not None
            hidden = self._embedding.embed(torch.from_numpy(batch.input_ids))
        if self._head is None or self._norm_weight is None:
            return numbers_of(self._compute_layers(hidden, batch, kv_cache, wanted=None))
        wanted = torch.from_numpy(batch.logits_indices)
        hidden = self._compute_layers(hidden, batch, kv_cache, wanted=wanted)
        return numbers_of(self._head(self._norm(hidden, self._norm_weight)))

    def _compute_layers(
        self, hidden: Tensor, batch: PackedBatch, kv_cache: KVCache, *, wanted: Tensor | None
    ) -> Tensor:
        """Hidden states [num_tokens, hidden_size], changed in place → those after the layers.

        Args:
            wanted: int64 [num_wanted], the tokens whose states are returned; None: all.
        """
        context = AttentionContext(batch, kv_cache, self._windows)
        cos, sin = self._rotation(torch.from_numpy(batch.positions))
        sin[:, : sin.shape[1] // 2].neg_()
        rotation = cos[:, None], sin[:, None]
        for index, layer in enumerate(self._layers):
            x = self._norm(hidden, layer.input_norm)
            hidden += self._add_up(self._attention(index, layer, x, rotation, context))
            if wanted is not None and index == len(self._layers) - 1:
                hidden = hidden[wanted]  # K/V of the other tokens is written: they have done their part
            x = self._norm(hidden, layer.post_norm)
            hidden += self._add_up(layer.down(silu(layer.gate(x)).mul_(layer.up(x))))
        return hidden

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """Root mean square normalisation of the last dimension (arXiv:1910.07467)."""
        return rms_norm(x, weight.shape, weight, self._facts.norm_eps)

    def _attention(
        self, index: int, layer: _Layer, x: Tensor, rotation: tuple[Tensor, Tensor], context: AttentionContext
    ) -> Tensor:
        shape = (len(x), -1, self._facts.head_dim)
        query, key = layer.query(x).view(shape), layer.key(x).view(shape)  # [num_tokens, heads, head_dim]
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key = self._norm(query, layer.query_norm), self._norm(key, layer.key_norm)
        query, key = _rotate(query, rotation), _rotate(key, rotation)
        value = layer.value(x).view(shape)
        found = attend(context, index, query, key, value, scale=self._facts.attention_scale)
        return layer.output(found.reshape(len(x), -1))

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions, both [num_tokens, head_dim]."""
        angles = torch.outer(positions.float(), self._frequencies).repeat(1, 2)
        scale = self._facts.rotary_scale
        return (angles.cos() * scale).to(self._dtype), (angles.sin() * scale).to(self._dtype)


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions (arXiv:2104.09864): halves as real and imaginary parts, [num_tokens, heads, head_dim].

    Args:
        rotation: cosines, and sines with their first half negated; both [num_tokens, 1, head_dim].
    """
    cos, signed_sin = rotation
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), signed_sin)
