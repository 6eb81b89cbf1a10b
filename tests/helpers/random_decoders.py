"""Tiny random decoders of every recognised kind, without a checkpoint, and steps of mixed batches for them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from shuteye import native
from shuteye.cache.kv_cache import KVCache
from shuteye.cache.kv_layout import KVLayout
from shuteye.matrices.matrix import Matrix
from shuteye.models.flat_weights import FlatWeights
from shuteye.models.fused import FusedSpec
from shuteye.models.kv_tensors import KVTensors
from shuteye.models.native_loop import rotation
from shuteye.native.decoder import DecoderStep, LayerSpec, NativeDecoder
from shuteye.tasks.generate.plans import Chunk, Scoring, StepPlan
from shuteye.tasks.generate.runner import PackedBatch

BLOCK_SIZE, NUM_BLOCKS, HIDDEN, INNER, VOCAB, NUM_LAYERS = 8, 65, 72, 104, 131, 3


@dataclass(frozen=True)
class Kind:
    """What distinguishes the recognised architectures."""

    heads: int
    kv_heads: int
    head_dim: int
    biased: bool = False
    head_norms: bool = False
    windows: tuple[int | None, ...] = (None,) * NUM_LAYERS


KINDS = {
    "llama": Kind(4, 2, 16),
    "smollm": Kind(9, 3, 8),
    "qwen2": Kind(4, 1, 20, biased=True),
    "qwen3": Kind(6, 2, 16, head_norms=True),
    "mistral": Kind(4, 4, 16, windows=(7, None, 19)),
}


@dataclass(frozen=True)
class Projection:
    """Weight [out, in] and bias [out]; several projections of one input lie side by side."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True)
class Layer:
    """One layer's tensors."""

    input_norm: torch.Tensor
    qkv: Projection
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    output: Projection
    post_norm: torch.Tensor
    gate_up: Projection
    down: Projection


@dataclass(frozen=True)
class Weights:
    """A decoder's tensors, or those of a part of one."""

    embedding: torch.Tensor | None
    layers: tuple[Layer, ...]
    norm: torch.Tensor | None
    head: Projection | None


class CacheArena:
    """A poisoned KV cache: every number, or the scale of every int8, is NaN until it is written."""

    def __init__(self, kind: Kind, dtype: torch.dtype, *, num_layers: int = NUM_LAYERS) -> None:
        held = str(dtype).removeprefix("torch.")
        layout = KVLayout(num_layers, BLOCK_SIZE, kind.kv_heads, kind.head_dim, held)
        self._bytes = torch.full((NUM_BLOCKS * layout.bytes_per_block,), 0xFF, dtype=torch.uint8)
        self.cache = KVCache(self, layout, num_blocks=NUM_BLOCKS)

    @property
    def tensors(self) -> KVTensors:
        """It as torch sees it."""
        return KVTensors(self.cache)

    @property
    def written(self) -> torch.Tensor:
        """True where a number, or a scale, is not the poison any more."""
        tensors = self.tensors
        return (tensors.numbers if tensors.scales is None else tensors.scales).isnan().logical_not()

    def bytes_view(self, offset: int, nbytes: int) -> memoryview:
        return memoryview(self._bytes.numpy()).cast("B")[offset : offset + nbytes]


def make_weights(kind: Kind, dtype: torch.dtype) -> Weights:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.2).to(dtype)

    def norm(width: int) -> torch.Tensor:
        return (1 + torch.randn(width, generator=generator) * 0.1).to(dtype)

    def projection(rows: int, width: int) -> Projection:
        return Projection(random(rows, width), random(rows) if kind.biased else None)

    layers = tuple(
        Layer(
            input_norm=norm(HIDDEN),
            qkv=projection((kind.heads + 2 * kind.kv_heads) * kind.head_dim, HIDDEN),
            query_norm=norm(kind.head_dim) if kind.head_norms else None,
            key_norm=norm(kind.head_dim) if kind.head_norms else None,
            output=projection(HIDDEN, kind.heads * kind.head_dim),
            post_norm=norm(HIDDEN),
            gate_up=projection(2 * INNER, HIDDEN),
            down=projection(HIDDEN, INNER),
        )
        for _ in range(NUM_LAYERS)
    )
    return Weights(random(VOCAB, HIDDEN), layers, norm(HIDDEN), projection(VOCAB, HIDDEN))


def facts_of(kind: Kind, *, num_layers: int = NUM_LAYERS) -> FusedSpec:
    return FusedSpec(num_layers, kind.heads, kind.kv_heads, kind.head_dim, 1e-5, kind.head_dim**-0.5, 1.0)


def flat(kind: Kind, weights: Weights, windows: tuple[int | None, ...] | list[int | None]) -> FlatWeights:
    """The same as matrices; they point into the tensors, whose owner must keep them."""
    layers = tuple(_layer_spec(kind, layer, window) for layer, window in zip(weights.layers, windows, strict=True))
    norm, head, embedding = weights.norm, weights.head, weights.embedding
    return FlatWeights(
        layers[0].query.dtype,
        HIDDEN,
        layers,
        None if embedding is None else native.matrix_of(embedding),
        None if norm is None else norm.data_ptr(),
        None if head is None else native.matrix_of(head.weight, head.bias),
        memoryview(b""),
    )


def _layer_spec(kind: Kind, layer: Layer, window: int | None) -> LayerSpec:
    heads, keys = kind.heads * kind.head_dim, kind.kv_heads * kind.head_dim
    inner = layer.down.weight.shape[1]
    return LayerSpec(
        layer.input_norm.data_ptr(),
        *_matrices(layer.qkv, [heads, keys, keys]),
        *_matrices(layer.output, [HIDDEN]),
        layer.post_norm.data_ptr(),
        *_matrices(layer.gate_up, [inner, inner]),
        *_matrices(layer.down, [HIDDEN]),
        None if layer.query_norm is None else layer.query_norm.data_ptr(),
        None if layer.key_norm is None else layer.key_norm.data_ptr(),
        window,
    )


def _matrices(wide: Projection, rows: list[int]) -> list[Matrix]:
    biases = [None] * len(rows) if wide.bias is None else torch.split(wide.bias, rows)
    return [native.matrix_of(weight, bias) for weight, bias in zip(torch.split(wide.weight, rows), biases, strict=True)]


def frequencies_of(kind: Kind) -> np.ndarray:
    return (10000.0 ** (-np.arange(0, kind.head_dim, 2) / kind.head_dim)).astype(np.float32)


def native_forward(decoder: NativeDecoder, batch: PackedBatch, frequencies: np.ndarray, dtype: str) -> torch.Tensor:
    """A step of a whole model."""
    cos, sin = rotation(frequencies, 1.0, batch.positions, dtype)
    step = DecoderStep(
        batch.input_ids, cos, sin, batch.slots, batch.query_starts, batch.context_lengths, batch.block_tables,
        batch.logits_indices,
    )  # fmt: skip
    return torch.from_numpy(decoder.forward(step))


def pack(*chunks: Chunk) -> PackedBatch:
    return PackedBatch.from_plan(StepPlan(chunks), block_size=BLOCK_SIZE)


def tokens(count: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def mixed_steps() -> list[tuple[Chunk, ...]]:
    """A prompt in two chunks, another that shares its first blocks in the same step, then decodes of both.

    Last a long prompt, computed with many tokens at once, all of whose logits are wanted; beside a decode.
    """
    shared = (5, 60, 7)
    first, second = (*shared, 11, 2, 33), (*shared, 40, 41, 3)
    start, long = tokens(24, 1), tokens(150, 9)
    scoring = Scoring(0, long[1:], 0)
    return [
        (Chunk("a", start, 0, first, False), Chunk("b", tokens(9, 2), 24, second, True)),
        (Chunk("a", tokens(5, 3), 24, first, True), Chunk("b", tokens(1, 4), 33, second, True)),
        (Chunk("b", tokens(1, 5), 34, second, True), Chunk("a", tokens(1, 6), 29, first, True)),
        (Chunk("b", tokens(2, 7), 35, second, False),),
        (Chunk("b", tokens(1, 8), 37, second, True),),
        (
            Chunk("c", long, 0, tuple(range(42, 61)), True, scoring=scoring),
            Chunk("b", tokens(1, 10), 38, second, True),
        ),
    ]
