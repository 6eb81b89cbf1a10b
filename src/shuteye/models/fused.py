"""Llama-like decoders as one flat loop over wide weights: what transformers' modules compute, without the modules.

Weights that are read together lie next to each other. A model that is not recognised to the last detail keeps its
modules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, rms_norm, silu

from shuteye.matrices.kinds import ROWS
from shuteye.matrices.matrix import Matrix
from shuteye.memory.layout import Slot
from shuteye.models.attention import AttentionContext, attend
from shuteye.native import MAX_TOKENS, CacheMemory, DecoderSpec, LayerSpec, NativeDecoder, NativeGroup, available
from shuteye.native.decoder import DecoderStep, Numbers, unsupported_shape

if TYPE_CHECKING:
    from shuteye.cache.kv_cache import KVCache
    from shuteye.tasks.generate.runner import PackedBatch

MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Types whose layer is exactly the one below: pre-norm, rotary positions, gated SiLU; nothing scaled or clipped."""

INVERSE_FREQUENCIES = "model.rotary_emb.inv_freq"
"""The buffer that the loop needs: float32 [head_dim / 2]."""


@dataclass(frozen=True, slots=True)
class FusedSpec:
    """What the loop must know beside tensors; an image keeps it, so that later loads need no module.

    Attributes:
        attention_scale: of the attention logits.
        rotary_scale: of cosines and sines (YaRN's attention factor; 1 elsewhere).
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    attention_scale: float
    rotary_scale: float


def recognise(module: Any) -> FusedSpec | None:
    """The facts of a transformers module that the loop can stand in for; None for any other."""
    config = module.config
    if config.model_type not in MODEL_TYPES or config.hidden_act != "silu":
        return None
    attention = module.model.layers[0].self_attn
    return FusedSpec(
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        norm_eps=config.rms_norm_eps,
        attention_scale=attention.scaling,
        rotary_scale=module.model.rotary_emb.attention_scaling,
    )


# --- the tensors ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Projection:
    """`x @ weight.T + bias`; weight [out, in]."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """[num_tokens, in] → [num_tokens, out]."""
        return linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer; `qkv` has the rows of the query, key and value heads, `gate_up` those of both halves."""

    input_norm: Tensor
    qkv: Projection
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Projection
    post_norm: Tensor
    gate_up: Projection
    down: Projection


@dataclass(frozen=True, slots=True)
class RankWeights:
    """A rank's tensors, as views of the arena: valid while it is resident.

    Attributes:
        embedding: of the whole vocabulary; on the first stage.
        norm, head: on the last stage; the head has the rank's rows of the vocabulary.
    """

    embedding: Tensor | None
    layers: tuple[Layer, ...]
    norm: Tensor | None
    head: Projection | None


@dataclass(frozen=True, slots=True)
class FusedWeights(RankWeights):
    """Every tensor of the model, on one rank."""

    embedding: Tensor
    norm: Tensor
    head: Projection


class NamedViews:
    """Tensors by checkpoint name; wide ones where slots lie adjacent.

    Args:
        slots: by checkpoint name, tied names included.
        view: a tensor over (offset, shape, dtype) of the arena.
    """

    def __init__(self, slots: Mapping[str, Slot], view: Callable[[int, Sequence[int], str], Tensor]) -> None:
        self._slots = slots
        self._view = view

    def get(self, *names: str) -> Tensor | None:
        """The rows of the named slots as one tensor; None unless they exist and nothing lies between them."""
        slots = [self._slots[name] for name in names if name in self._slots]
        touching = all(right.offset == left.offset + left.nbytes for left, right in pairwise(slots))
        if len(slots) < len(names) or not touching:
            return None
        rows = sum(slot.shape[0] for slot in slots)
        return self._view(slots[0].offset, (rows, *slots[0].shape[1:]), slots[0].dtype)

    def __getitem__(self, name: str) -> Tensor:
        slot = self._slots[name]
        return self._view(slot.offset, slot.shape, slot.dtype)

    def projection(self, *names: str) -> Projection | None:
        """Several projections of one input as one; None unless they, and their biases if any, lie adjacent."""
        weight, bias = self.get(*(f"{name}.weight" for name in names)), self.get(*(f"{name}.bias" for name in names))
        has_bias = any(f"{name}.bias" in self._slots for name in names)
        return None if weight is None or (has_bias and bias is None) else Projection(weight, bias)

    def layer(self, prefix: str) -> Layer | None:
        """One layer, or None if it is not laid out for the loop."""
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        qkv = self.projection(*(f"{attention}.{part}_proj" for part in "qkv"))
        gate_up = self.projection(f"{mlp}.gate_proj", f"{mlp}.up_proj")
        output, down = self.projection(f"{attention}.o_proj"), self.projection(f"{mlp}.down_proj")
        if qkv is None or gate_up is None or output is None or down is None:
            return None
        return Layer(
            input_norm=self[f"{prefix}.input_layernorm.weight"],
            qkv=qkv,
            query_norm=self.get(f"{attention}.q_norm.weight"),
            key_norm=self.get(f"{attention}.k_norm.weight"),
            output=output,
            post_norm=self[f"{prefix}.post_attention_layernorm.weight"],
            gate_up=gate_up,
            down=down,
        )


def wide_weights(
    slots: Mapping[str, Slot], view: Callable[[int, Sequence[int], str], Tensor], *, num_layers: int
) -> FusedWeights | None:
    """The model's tensors with projections of one input side by side; None if some are not laid out so.

    Args:
        slots: by checkpoint name, tied names included.
        view: a tensor over (offset, shape, dtype) of the arena.
    """
    named = NamedViews(slots, view)
    layers = [named.layer(f"model.layers.{index}") for index in range(num_layers)]
    head = named.projection("lm_head")
    complete = tuple(layer for layer in layers if layer is not None)
    if head is None or len(complete) < num_layers:
        return None
    return FusedWeights(named["model.embed_tokens.weight"], complete, named["model.norm.weight"], head)


# --- the loop -------------------------------------------------------------------------------------


class FlatLoop:
    """The layers of a packed step: in torch alone, or with what is before and after them in native kernels.

    What torch has to compute before and after the layers is for those who build on it.

    Args:
        windows: per layer, how many positions back a token sees, itself included; None sees all.
        native: whether to use the native kernels if they can be used here.

    Attributes:
        native_tokens: what the native kernels compute at a time; larger steps take several. 0 if they are not used.
    """

    def __init__(
        self,
        facts: FusedSpec,
        weights: RankWeights,
        inverse_frequencies: Tensor,
        windows: Sequence[int | None],
        *,
        native: bool = True,
    ) -> None:
        self.inverse_frequencies = inverse_frequencies
        self._facts = facts
        self._weights = weights
        self._windows = windows
        self._dtype = weights.layers[0].input_norm.dtype
        heads = {"num_heads": facts.num_heads, "num_kv_heads": facts.num_kv_heads, "head_dim": facts.head_dim}
        usable = native and available() and unsupported_shape(_name_of(self._dtype), **heads) is None
        self.native_tokens = MAX_TOKENS if usable else 0
        self._native: tuple[KVCache, NativeDecoder] | None = None

    def _compute_natively(
        self,
        batch: PackedBatch,
        kv_cache: KVCache,
        *,
        hidden_in: Tensor | None = None,
        group: NativeGroup | None = None,
    ) -> Tensor | None:
        """What `NativeDecoder.forward` gives; None if it is not used."""
        native = self._native_over(kv_cache)
        if native is None:
            return None
        cos, sin = self._rotation(batch.positions, self._dtype)
        step = DecoderStep(
            batch.input_ids.numpy(),
            _bits(cos),
            _bits(sin),
            batch.slots.numpy(),
            batch.query_starts,
            batch.context_lengths,
            batch.block_tables,
            batch.logits_indices.numpy(),
            None if hidden_in is None else _bits(hidden_in),
        )
        found = torch.from_numpy(native.forward(step, group=group))
        return found.view(torch.bfloat16) if found.dtype == torch.uint16 else found

    def _native_over(self, kv_cache: KVCache) -> NativeDecoder | None:
        """The native decoder bound to this cache; made at the first step."""
        if not self.native_tokens:
            return None
        if self._native is None or self._native[0] is not kv_cache:
            spec = decoder_spec(self._facts, self._weights, self._windows, kv_cache.blocks)
            self._native = (kv_cache, NativeDecoder.create(spec))
        return self._native[1]

    def _compute_layers(
        self, hidden: Tensor, batch: PackedBatch, kv_cache: KVCache, *, wanted: Tensor | None
    ) -> Tensor:
        """Hidden states [num_tokens, hidden_size], changed in place → those after the layers.

        Args:
            wanted: int64 [num_wanted], the tokens whose states are returned; None: all.
        """
        context = AttentionContext(batch, kv_cache, self._windows)
        cos, sin = self._rotation(batch.positions, hidden.dtype)
        sin[:, : sin.shape[1] // 2].neg_()
        rotation = cos[:, None], sin[:, None]
        layers = self._weights.layers
        for index, layer in enumerate(layers):
            hidden += self._whole(
                self._attention(index, layer, self._norm(hidden, layer.input_norm), rotation, context)
            )
            if wanted is not None and index == len(layers) - 1:
                hidden = hidden[wanted]  # K/V of the other tokens is written: they have done their part
            gate, up = layer.gate_up(self._norm(hidden, layer.post_norm)).chunk(2, dim=-1)
            hidden += self._whole(layer.down(silu(gate).mul_(up)))
        return hidden

    def _whole(self, product: Tensor) -> Tensor:
        """A layer's output or down projection, [num_tokens, hidden_size], summed over those who have a part in it."""
        return product

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """Root mean square normalisation of the last dimension (arXiv:1910.07467)."""
        return rms_norm(x, weight.shape, weight, self._facts.norm_eps)

    def _attention(
        self, index: int, layer: Layer, x: Tensor, rotation: tuple[Tensor, Tensor], context: AttentionContext
    ) -> Tensor:
        key_start = self._facts.num_heads
        value_start = key_start + self._facts.num_kv_heads
        heads = layer.qkv(x).view(len(x), -1, self._facts.head_dim)  # [num_tokens, query + key + value heads, head_dim]
        if layer.query_norm is not None and layer.key_norm is not None:
            query = _rotate(self._norm(heads[:, :key_start], layer.query_norm), rotation)
            key = _rotate(self._norm(heads[:, key_start:value_start], layer.key_norm), rotation)
        else:
            both = _rotate(heads[:, :value_start], rotation)
            query, key = both[:, :key_start], both[:, key_start:]
        found = attend(context, index, query, key, heads[:, value_start:], scale=self._facts.attention_scale)
        return layer.output(found.reshape(len(x), -1))

    def _rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions, both [num_tokens, head_dim]."""
        angles = torch.outer(positions.float(), self.inverse_frequencies).repeat(1, 2)
        scale = self._facts.rotary_scale
        return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


class FusedDecoder(FlatLoop):
    """The whole model of a packed step: small steps by native kernels where they are to be had, others by torch."""

    _weights: FusedWeights

    def forward(self, batch: PackedBatch, kv_cache: KVCache) -> Tensor:
        """Compute a step: logits [num_sampled, vocab_size], in the model's dtype or in float32."""
        logits = self._compute_natively(batch, kv_cache)
        return self._forward_in_torch(batch, kv_cache) if logits is None else logits

    def _forward_in_torch(self, batch: PackedBatch, kv_cache: KVCache) -> Tensor:
        weights = self._weights
        hidden = embedding(batch.input_ids, weights.embedding)  # [num_tokens, hidden_size]
        hidden = self._compute_layers(hidden, batch, kv_cache, wanted=batch.logits_indices)
        return weights.head(self._norm(hidden, weights.norm))


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions (arXiv:2104.09864): halves as real and imaginary parts, [num_tokens, heads, head_dim].

    Args:
        rotation: cosines, and sines with their first half negated; both [num_tokens, 1, head_dim].
    """
    cos, signed_sin = rotation
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), signed_sin)


# --- the native twin ------------------------------------------------------------------------------


def decoder_spec(facts: FusedSpec, weights: RankWeights, windows: Sequence[int | None], blocks: Tensor) -> DecoderSpec:
    """The same model, or part, as the native kernels take it, over the KV cache `blocks` (see `KVCache.blocks`)."""
    head = weights.head
    return DecoderSpec(
        dtype=_name_of(weights.layers[0].input_norm.dtype),
        layers=tuple(_layer_spec(facts, layer, window) for layer, window in zip(weights.layers, windows, strict=True)),
        embedding=None if weights.embedding is None else _matrix(weights.embedding, None),
        final_norm=None if weights.norm is None else weights.norm.data_ptr(),
        head=None if head is None else _matrix(head.weight, head.bias),
        num_heads=facts.num_heads,
        eps=facts.norm_eps,
        scale=facts.attention_scale,
        kv_cache=CacheMemory(blocks.data_ptr(), blocks.shape),
    )


def _layer_spec(facts: FusedSpec, layer: Layer, window: int | None) -> LayerSpec:
    heads, keys = facts.num_heads * facts.head_dim, facts.num_kv_heads * facts.head_dim
    inner = layer.down.weight.shape[1]
    query, key, value = _matrices(layer.qkv, [heads, keys, keys])
    gate, up = _matrices(layer.gate_up, [inner, inner])
    return LayerSpec(
        input_norm=layer.input_norm.data_ptr(),
        query=query,
        key=key,
        value=value,
        query_norm=None if layer.query_norm is None else layer.query_norm.data_ptr(),
        key_norm=None if layer.key_norm is None else layer.key_norm.data_ptr(),
        output=_matrix(layer.output.weight, layer.output.bias),
        post_norm=layer.post_norm.data_ptr(),
        gate=gate,
        up=up,
        down=_matrix(layer.down.weight, layer.down.bias),
        window=window,
    )


def _matrices(wide: Projection, rows: list[int]) -> list[Matrix]:
    """Projections that lie side by side, each of so many rows."""
    biases = (None,) * len(rows) if wide.bias is None else torch.split(wide.bias, rows)
    return [_matrix(weight, bias) for weight, bias in zip(torch.split(wide.weight, rows), biases, strict=True)]


def _matrix(weight: Tensor, bias: Tensor | None) -> Matrix:
    rows, columns = weight.shape
    assert weight.is_contiguous()
    address = 0 if bias is None else bias.data_ptr()
    return Matrix(ROWS, rows, columns, _name_of(weight.dtype), weight.data_ptr(), address)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bits(tensor: Tensor) -> Numbers:
    """The same memory as numpy has it, bfloat16 as its bits."""
    bits = tensor.contiguous()
    return (bits.view(torch.uint16) if bits.dtype == torch.bfloat16 else bits).numpy()


FUSABLE = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Projections of one input that can be one matrix; their order is the order of their rows."""

_LAYER = re.compile(r"^(?:.*?\.)?(?:layers|h|blocks)\.\d+(?=\.)")


def group_of(name: str) -> str:
    """The layer a tensor belongs to (`model.layers.3`), or its own module: what is brought in together."""
    match = _LAYER.match(name)
    return match[0] if match else name.rpartition(".")[0]


def layout_order(names: Sequence[str]) -> list[str]:
    """`names` in the order they are laid out: layer by layer as given, with fusable projections adjacent.

    Projections of one set are ordered kind by kind: all their weights, then all their biases, so that the fused
    weight and the fused bias are each one contiguous range.
    """
    place = {name: index for index, name in enumerate(names)}
    anchors: dict[tuple[str, str], int] = {}
    for name in names:
        key = _fused_key(name)
        if key is not None:
            anchors[key[:2]] = min(anchors.get(key[:2], place[name]), place[name])

    def sort_key(name: str) -> tuple[int, str, int, int]:
        key = _fused_key(name)
        if key is None:
            return (place[name], "", 0, 0)
        parent, members, kind, index = key
        return (anchors[parent, members], _KIND_ORDER.get(kind, "z" + kind), index, place[name])

    return sorted(names, key=sort_key)


def are_joined(before: str, name: str) -> bool:
    """Whether two tensors are of one set and kind, so that they are read as one if they touch."""
    key = _fused_key(name)
    left = _fused_key(before)
    return key is not None and left is not None and left[:3] == key[:3]


_KIND_ORDER = {"weight": "a", "bias": "b"}


def _fused_key(name: str) -> tuple[str, str, str, int] | None:
    """(parent module, which set, weight or bias, place in the set) of a fusable tensor."""
    module, _, kind = name.rpartition(".")
    parent, _, leaf = module.rpartition(".")
    for members in FUSABLE:
        if leaf in members:
            return parent, members[0], kind, members.index(leaf)
    return None
