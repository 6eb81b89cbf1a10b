"""Llama-like decoders as one flat loop over wide weights: what transformers' modules compute, without the modules.

Knows nothing of checkpoints or of any batch. A model that is not recognised to the last detail keeps its modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, silu

from shuteye.memory.arena import Arena
from shuteye.memory.layout import Layout
from shuteye.models.attention import AttentionContext, attend

MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Types whose layer is exactly the one below: pre-norm, rotary positions, gated SiLU; nothing scaled or clipped."""


@dataclass(frozen=True, slots=True)
class Projection:
    """`x @ weight.T + bias`; weight [out, in]."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """[num_tokens, in] → [num_tokens, out]."""
        return linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class Norm:
    """Root mean square normalisation over the last dimension (arXiv:1910.07467)."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """Any shape whose last dimension is the weight's."""
        return rms_norm(x, self.weight.shape, self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer; `qkv` has the rows of the query, key and value heads, `gate_up` those of both halves."""

    input_norm: Norm
    qkv: Projection
    query_norm: Norm | None
    key_norm: Norm | None
    output: Projection
    post_norm: Norm
    gate_up: Projection
    down: Projection


class FusedDecoder:
    """The whole model of a packed step. Weights are views of the arena: valid while it is resident."""

    def __init__(self, module: Any, layers: list[Layer]) -> None:
        config, first = module.config, module.model.layers[0].self_attn
        self._embedding: Tensor = module.model.embed_tokens.weight
        self._rotary = module.model.rotary_emb
        self._layers = layers
        self._norm = _norm(module.model.norm)
        self._head = Projection(module.lm_head.weight, module.lm_head.bias)
        self._head_dim: int = first.head_dim
        self._scale: float = first.scaling
        self._num_heads: int = config.num_attention_heads
        self._num_kv_heads: int = config.num_key_value_heads

    def forward(self, token_ids: Tensor, positions: Tensor, wanted: Tensor, context: AttentionContext) -> Tensor:
        """Compute a step.

        Args:
            token_ids, positions: int64 [num_tokens].
            wanted: int64 [num_sampled], the tokens whose logits are wanted.

        Returns:
            Logits [num_sampled, vocab_size] in the model's dtype.
        """
        hidden = nn.functional.embedding(token_ids, self._embedding)  # [num_tokens, hidden_size]
        rotation = self._rotation(hidden, positions)
        for index, layer in enumerate(self._layers):
            hidden += self._attention(index, layer, layer.input_norm(hidden), rotation, context)
            if index == len(self._layers) - 1:
                hidden = hidden[wanted]  # K/V of the other tokens is written; nothing else of them is needed
            gate, up = layer.gate_up(layer.post_norm(hidden)).chunk(2, dim=-1)
            hidden += layer.down(silu(gate).mul_(up))
        return self._head(self._norm(hidden))

    def _attention(
        self, index: int, layer: Layer, x: Tensor, rotation: tuple[Tensor, Tensor], context: AttentionContext
    ) -> Tensor:
        heads = layer.qkv(x).view(len(x), -1, self._head_dim)  # [num_tokens, query + key + value heads, head_dim]
        key_start, value_start = self._num_heads, self._num_heads + self._num_kv_heads
        query, key, value = heads[:, :key_start], heads[:, key_start:value_start], heads[:, value_start:]
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key = _rotate(layer.query_norm(query), rotation), _rotate(layer.key_norm(key), rotation)
        else:
            both = _rotate(heads[:, :value_start], rotation)
            query, key = both[:, :key_start], both[:, key_start:]
        found = attend(context, index, query, key, value, scale=self._scale)
        return layer.output(found.reshape(len(x), -1))

    def _rotation(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines, and sines with the sign that `_rotate` needs: both [num_tokens, 1, head_dim]."""
        cos, sin = self._rotary(hidden, positions[None])
        sin = sin[0, :, None].clone()
        sin[..., : sin.shape[-1] // 2].neg_()
        return cos[0, :, None], sin


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions (arXiv:2104.09864): halves as real and imaginary parts, [num_tokens, heads, head_dim]."""
    cos, signed_sin = rotation
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), signed_sin)


# --- recognition ----------------------------------------------------------------------------------


def fuse(module: Any, layout: Layout, arena: Arena) -> FusedDecoder | None:
    """The same model as a flat loop, or None where it is not recognised, or not laid out for it."""
    config = module.config
    if config.model_type not in MODEL_TYPES or config.hidden_act != "silu":
        return None
    layers = [_layer(layer, f"model.layers.{index}", layout, arena) for index, layer in enumerate(module.model.layers)]
    complete = [layer for layer in layers if layer is not None]
    return FusedDecoder(module, complete) if len(complete) == len(layers) else None


def _layer(layer: Any, name: str, layout: Layout, arena: Arena) -> Layer | None:
    attention, mlp = layer.self_attn, layer.mlp
    qkv = _wide([f"{name}.self_attn.{part}_proj" for part in "qkv"], layout, arena)
    gate_up = _wide([f"{name}.mlp.{part}_proj" for part in ("gate", "up")], layout, arena)
    if qkv is None or gate_up is None:
        return None
    query_norm, key_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return Layer(
        input_norm=_norm(layer.input_layernorm),
        qkv=qkv,
        query_norm=None if query_norm is None else _norm(query_norm),
        key_norm=None if key_norm is None else _norm(key_norm),
        output=Projection(attention.o_proj.weight, attention.o_proj.bias),
        post_norm=_norm(layer.post_attention_layernorm),
        gate_up=gate_up,
        down=Projection(mlp.down_proj.weight, mlp.down_proj.bias),
    )


def _norm(module: Any) -> Norm:
    return Norm(module.weight, module.variance_epsilon)


def _wide(names: list[str], layout: Layout, arena: Arena) -> Projection | None:
    """Several projections of one input as one; None unless they lie adjacent."""
    weight = _adjacent([f"{name}.weight" for name in names], layout, arena)
    if weight is None:
        return None
    biases = [f"{name}.bias" for name in names]
    if not any(bias in layout.slots for bias in biases):
        return Projection(weight, None)
    bias = _adjacent(biases, layout, arena)
    return None if bias is None else Projection(weight, bias)


def _adjacent(names: list[str], layout: Layout, arena: Arena) -> Tensor | None:
    """The rows of the named slots as one tensor, if they exist and nothing lies between them."""
    slots = [slot for name in names if (slot := layout.slots.get(name)) is not None]
    if len(slots) < len(names) or any(right.offset != left.offset + left.nbytes for left, right in pairwise(slots)):
        return None
    rows = sum(slot.shape[0] for slot in slots)
    return arena.view(slots[0].offset, (rows, *slots[0].shape[1:]), slots[0].dtype)
