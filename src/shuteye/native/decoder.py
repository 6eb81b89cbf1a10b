"""A decoder step, of a whole model or of one rank's part, in one foreign call, which releases the interpreter.

Only pointers are kept; a step is valid while the memory of weights and cache is resident.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from shuteye.native import library as structs
from shuteye.native.kernels import DTYPES, PackedSequences, cache_struct, pointer
from shuteye.native.library import load

MAX_TOKENS = 512
"""Measured up to here: oneDNN is faster at none of these. Scratch grows with it: 3 MB a thread for SmolLM2."""

MAX_GROUP = 64
"""Query heads that share a KV head."""


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer's weights, [out, in] where they are matrices, all of the model's dtype and contiguous.

    Attributes:
        qkv_weight: rows of the query, key and value heads, in that order.
        gate_up_weight: rows of gate, then of up.
        window: positions a query sees, itself included; None: all.
    """

    input_norm: Tensor
    qkv_weight: Tensor
    output_weight: Tensor
    post_norm: Tensor
    gate_up_weight: Tensor
    down_weight: Tensor
    qkv_bias: Tensor | None = None
    output_bias: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    window: int | None = None


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A decoder: pre-norm layers, rotary positions, gated SiLU; or one rank's part of it, with its layers and heads.

    Attributes:
        embedding: [vocab, hidden]; None: steps begin with hidden states.
        final_norm, head_weight: [hidden] and [vocab, hidden]; None: steps end with hidden states. The head may be the
            embedding, or have fewer rows.
        kv_cache: [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim], of the same dtype.
        scale: of the attention logits.
    """

    layers: tuple[LayerSpec, ...]
    embedding: Tensor | None
    final_norm: Tensor | None
    head_weight: Tensor | None
    head_bias: Tensor | None
    num_heads: int
    eps: float
    scale: float
    kv_cache: Tensor
    max_tokens: int = MAX_TOKENS

    @property
    def dtype(self) -> torch.dtype:
        """Of all tensors."""
        return self.layers[0].input_norm.dtype

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return self.layers[0].input_norm.numel()


class NativeGroup(Protocol):
    """The ranks that add up their parts, with a handle that native code understands."""

    def call(self, function: Callable[[int], int]) -> None:
        """Have `function(handle)` make this rank's calls; raise why the group was aborted if it gives 0."""
        ...


class NativeDecoder:
    """A bound decoder. Keeps the tensors of its spec alive, not their memory."""

    def __init__(self, handle: int, spec: DecoderSpec) -> None:
        self._handle = handle
        self._spec = spec
        self._run = load().shuteye_decoder_run
        self._block_size: int = spec.kv_cache.shape[3]
        self._vocab = 0 if spec.head_weight is None else spec.head_weight.shape[0]
        self.max_tokens = spec.max_tokens
        weakref.finalize(self, load().shuteye_decoder_destroy, handle)

    @classmethod
    def create(cls, spec: DecoderSpec) -> NativeDecoder:
        """Bind a model.

        Raises:
            NativeUnavailable: the native library cannot be used here.
            ValueError: the model is not one it computes; the message says why.
        """
        if wrong := unsupported(spec):
            raise ValueError(f"The native decoder does not compute this model: {wrong}")
        layers = (structs.Layer * len(spec.layers))(*(_layer(layer) for layer in spec.layers))
        first = spec.layers[0]
        model = structs.Model(
            DTYPES[spec.dtype], spec.hidden_size, len(layers), spec.num_heads, first.down_weight.shape[1],
            *(0 if table is None else table.shape[0] for table in (spec.embedding, spec.head_weight)),
            spec.max_tokens, spec.eps, spec.scale,
            *(pointer(tensor) for tensor in (spec.embedding, spec.final_norm, spec.head_weight, spec.head_bias)),
            layers, cache_struct(spec.kv_cache),
        )  # fmt: skip
        return cls(load().shuteye_decoder_create(ctypes.byref(model)), spec)

    def forward(  # noqa: PLR0917  (a packed step's fields, in their order)
        self,
        token_ids: Tensor,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        query_starts: Sequence[int],
        context_lengths: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        wanted: Tensor,
        *,
        hidden_in: Tensor | None = None,
        group: NativeGroup | None = None,
    ) -> Tensor:
        """Compute a step of at most `max_tokens` tokens; keys and values go to the cache.

        Args:
            token_ids, slots: int64 [num_tokens].
            cos, sin: of the positions, [num_tokens, head_dim] in the model's dtype, as transformers gives them.
            query_starts, context_lengths, block_tables: as in `PackedBatch`.
            wanted: int64 [num_sampled], the tokens whose logits are wanted.
            hidden_in: [num_tokens, hidden], what a part without embeddings begins with.
            group: those who hold the other heads and rows of these layers, and compute the same step; if there are any.

        Returns:
            float32 logits [num_sampled, vocab], of the precision of the model's dtype; of a part without a head the
            hidden states [num_tokens, hidden].

        Raises:
            ValueError: the step is inconsistent, or points outside the cache; nothing was computed.
            GroupAborted: as `group` raises it; keys and values of the step are undefined.
        """
        spec = self._spec
        num_tokens, num_sampled = token_ids.numel(), wanted.numel()
        assert cos.dtype == sin.dtype == spec.dtype, f"cos and sin must be {spec.dtype}, not {cos.dtype}"
        assert cos.numel() == sin.numel() == num_tokens * spec.kv_cache.shape[5]
        assert (hidden_in is None) == (spec.embedding is not None), "steps begin with tokens or with hidden states"
        assert hidden_in is None or (hidden_in.shape, hidden_in.dtype) == ((num_tokens, spec.hidden_size), spec.dtype)
        sequences = PackedSequences.pack(query_starts, context_lengths, block_tables, block_size=self._block_size)
        logits = torch.empty((num_sampled, self._vocab), dtype=torch.float32)
        hidden_out = None if self._vocab else torch.empty((num_tokens, spec.hidden_size), dtype=spec.dtype)
        step = structs.Step(
            num_tokens, num_sampled,
            *(pointer(tensor) for tensor in (token_ids, cos, sin, slots, wanted, logits)), sequences.struct,
            *(pointer(tensor) for tensor in (hidden_in, hidden_out)),
        )  # fmt: skip
        if group is None:
            self._step(step, None)
        else:
            group.call(lambda handle: self._step(step, handle))
        return logits if hidden_out is None else hidden_out

    def _step(self, step: structs.Step, group: int | None) -> bool:
        """Whether it came to its end."""
        step.group = group
        if wrong := self._run(self._handle, ctypes.byref(step)):
            raise ValueError(f"native decoder: {wrong.decode()}")
        return not step.aborted


def unsupported(spec: DecoderSpec) -> str | None:
    """What about a model the kernels do not compute; None if they do."""
    num_kv_heads, head_dim = spec.kv_cache.shape[4:]
    if wrong := unsupported_shape(spec.dtype, head_dim=head_dim, num_heads=spec.num_heads, num_kv_heads=num_kv_heads):
        return wrong
    others = {tensor.dtype for layer in spec.layers for tensor in _tensors(layer)} - {spec.dtype}
    if others or spec.kv_cache.dtype != spec.dtype:
        return f"tensors of several dtypes ({', '.join(map(str, {spec.dtype, spec.kv_cache.dtype} | others))})"
    return None


def unsupported_shape(dtype: torch.dtype, *, head_dim: int, num_heads: int, num_kv_heads: int) -> str | None:
    """What about these sizes the kernels do not compute; None if they do."""
    if dtype not in DTYPES:
        return f"dtype {dtype} (float32 and bfloat16 are)"
    if head_dim % 2:
        return f"heads of {head_dim}, an odd number"
    if num_heads % num_kv_heads or num_heads // num_kv_heads > MAX_GROUP:
        return f"{num_heads} query heads on {num_kv_heads} KV heads"
    return None


def _layer(layer: LayerSpec) -> structs.Layer:
    pointers = {name: pointer(getattr(layer, name)) for name in LayerSpec.__slots__ if name != "window"}
    return structs.Layer(**pointers, window=layer.window or 0)


def _tensors(layer: LayerSpec) -> list[Tensor]:
    values = (getattr(layer, name) for name in LayerSpec.__slots__)
    return [value for value in values if isinstance(value, Tensor)]
