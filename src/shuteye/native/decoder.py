"""A decoder step, of a whole model or of one rank's part, in one foreign call, which releases the interpreter.

Only addresses are kept; a step is valid while the memory of weights and cache is there and resident.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from shuteye.matrices.matrix import Matrix
from shuteye.native import library as structs
from shuteye.native.library import CACHE_DTYPES, DTYPES, load

MAX_TOKENS = 512
"""Of one foreign call; longer steps take several. Scratch grows with it: 3 MB a thread for SmolLM2."""

MAX_GROUP = 64
"""Query heads that share a KV head."""

Integers = npt.NDArray[np.int64]
Numbers = npt.NDArray[Any]
"""float32, or uint16: the bits of bfloat16."""

_SCALES = {"f32": 0, "bf16": 1, "f16": 2}
_STORED: dict[str, type[np.generic]] = {"float32": np.float32, "bfloat16": np.uint16}


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer's weights. Norms are addresses, of vectors of the model's dtype.

    Attributes:
        window: positions a query sees, itself included; None: all.
    """

    input_norm: int
    query: Matrix
    key: Matrix
    value: Matrix
    output: Matrix
    post_norm: int
    gate: Matrix
    up: Matrix
    down: Matrix
    query_norm: int | None = None
    key_norm: int | None = None
    window: int | None = None

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """All of them."""
        return (self.query, self.key, self.value, self.output, self.gate, self.up, self.down)


@dataclass(frozen=True, slots=True)
class CacheMemory:
    """A KV cache: [num_blocks, num_layers, 2] halves, whose bytes csrc/kv_cache.h knows.

    Attributes:
        dtype: one of `CACHE_DTYPES`.
    """

    address: int
    dtype: str
    num_blocks: int
    num_layers: int
    block_size: int
    num_kv_heads: int
    head_dim: int

    @property
    def struct(self) -> structs.Cache:
        """As C sees it."""
        return structs.Cache(
            self.address, CACHE_DTYPES[self.dtype], self.num_blocks, self.num_layers, self.block_size,
            self.num_kv_heads, self.head_dim,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A decoder: pre-norm layers, rotary positions, gated SiLU; or one rank's part of it, with its layers and heads.

    Attributes:
        dtype: `float32` or `bfloat16`: of activations, norms, biases, and matrices of kind `rows`.
        embedding: [vocab, hidden]; None: steps begin with hidden states.
        final_norm, head: address of [hidden], and [vocab, hidden]; None: steps end with hidden states. The head may be
            the embedding, or have fewer rows.
        scale: of the attention logits.
    """

    dtype: str
    layers: tuple[LayerSpec, ...]
    embedding: Matrix | None
    final_norm: int | None
    head: Matrix | None
    num_heads: int
    eps: float
    scale: float
    kv_cache: CacheMemory
    max_tokens: int = MAX_TOKENS

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return self.layers[0].down.rows


class NativeGroup(Protocol):
    """The ranks that add up their parts, with a handle that native code understands."""

    def call(self, function: Callable[[int], int]) -> None:
        """Have `function(handle)` make this rank's calls; raise why the group was aborted if it gives 0."""
        ...


@dataclass(frozen=True, slots=True)
class PackedSequences:
    """A batch's sequences as arrays; `struct` points into them."""

    struct: structs.Sequences
    arrays: tuple[Integers, ...]

    @classmethod
    def pack(
        cls,
        query_starts: Sequence[int],
        context_lengths: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        *,
        block_size: int,
    ) -> PackedSequences:
        """Only the blocks that a context needs are passed on."""
        used = [-(-length // block_size) for length in context_lengths]
        tables = [table[:count] for table, count in zip(block_tables, used, strict=True)]
        lengths = [len(table) for table in tables]
        assert lengths == used, f"block tables of {lengths} blocks do not cover contexts of {used}"
        arrays = (
            np.array(query_starts, np.int64),
            np.array(context_lengths, np.int64),
            np.cumsum([0, *used[:-1]], dtype=np.int64),
            np.fromiter(chain.from_iterable(tables), np.int64, sum(used)),
        )
        return cls(structs.Sequences(len(used), *(address(array) for array in arrays)), arrays)


@dataclass(frozen=True, slots=True)
class DecoderStep:
    """A packed step.

    Attributes:
        token_ids, slots: int64 [num_tokens].
        cos, sin: of the positions, [num_tokens, head_dim] in the model's dtype, as transformers gives them.
        query_starts, context_lengths, block_tables: as in `PackedBatch`.
        wanted: int64 [num_sampled], the tokens whose logits are wanted.
        hidden_in: [num_tokens, hidden], what a part without embeddings begins with.
    """

    token_ids: Integers
    cos: Numbers
    sin: Numbers
    slots: Integers
    query_starts: Sequence[int]
    context_lengths: Sequence[int]
    block_tables: Sequence[Sequence[int]]
    wanted: Integers
    hidden_in: Numbers | None = None

    @property
    def num_tokens(self) -> int:
        """Of all sequences."""
        return len(self.token_ids)

    def part(self, first: int, end: int) -> tuple[DecoderStep, npt.NDArray[np.bool_]]:
        """Tokens [first, end), whose contexts end with them; and which of the wanted tokens are theirs."""
        bounds = list(zip(self.query_starts[:-1], self.query_starts[1:], strict=True))
        kept = [index for index, (start, stop) in enumerate(bounds) if start < end and stop > first]
        here = (self.wanted >= first) & (self.wanted < end)
        tokens = slice(first, end)
        step = DecoderStep(
            self.token_ids[tokens],
            self.cos[tokens],
            self.sin[tokens],
            self.slots[tokens],
            [0, *(min(bounds[index][1], end) - first for index in kept)],
            [self.context_lengths[index] - max(0, bounds[index][1] - end) for index in kept],
            [self.block_tables[index] for index in kept],
            self.wanted[here] - first,
            None if self.hidden_in is None else self.hidden_in[tokens],
        )
        return step, here


class NativeDecoder:
    """A bound decoder."""

    def __init__(self, handle: int, spec: DecoderSpec) -> None:
        self._handle = handle
        self._spec = spec
        self._run = load().shuteye_decoder_run
        self._vocab = 0 if spec.head is None else spec.head.rows
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
        model = structs.Model(
            DTYPES[spec.dtype], spec.hidden_size, len(layers), spec.num_heads, spec.layers[0].down.columns,
            spec.max_tokens, spec.eps, spec.scale, matrix_struct(spec.embedding), spec.final_norm,
            matrix_struct(spec.head), layers, spec.kv_cache.struct,
        )  # fmt: skip
        return cls(load().shuteye_decoder_create(ctypes.byref(model)), spec)

    def forward(self, step: DecoderStep, *, group: NativeGroup | None = None) -> Numbers:
        """Compute a step; keys and values go to the cache.

        One of more than `max_tokens` tokens is computed in pieces, in order: each finds those before it in the cache.

        Args:
            group: those who hold the other heads and rows of these layers, and compute the same step; if there are any.

        Returns:
            float32 logits [num_sampled, vocab], of the precision of the model's dtype; of a part without a head the
            hidden states [num_tokens, hidden].

        Raises:
            ValueError: the step is inconsistent, or points outside the cache; of a piece, nothing was computed.
            GroupAborted: as `group` raises it; keys and values of the step are undefined.
        """
        spec, stored = self._spec, _STORED[self._spec.dtype]
        assert step.cos.dtype == step.sin.dtype == stored, f"cos and sin must be {stored}, not {step.cos.dtype}"
        assert step.cos.shape == step.sin.shape == (step.num_tokens, spec.kv_cache.head_dim)
        assert (step.hidden_in is None) == (spec.embedding is not None), "steps begin with tokens or hidden states"
        logits = np.empty((len(step.wanted), self._vocab), np.float32)
        hidden_out = None if self._vocab else np.empty((step.num_tokens, spec.hidden_size), stored)
        for piece, wanted, tokens in self._pieces(step):
            found = logits if wanted.all() else np.empty((len(piece.wanted), self._vocab), np.float32)
            self._compute(piece, found, None if hidden_out is None else hidden_out[tokens], group)
            if found is not logits:
                logits[wanted] = found
        return logits if hidden_out is None else hidden_out

    def _pieces(self, step: DecoderStep) -> Iterator[tuple[DecoderStep, npt.NDArray[np.bool_], slice]]:
        """What one call computes, which of the wanted tokens it has, and where its tokens are."""
        size = self._spec.max_tokens
        for first in range(0, max(1, step.num_tokens), size):
            tokens = slice(first, min(first + size, step.num_tokens))
            yield *step.part(first, tokens.stop), tokens

    def _compute(
        self, step: DecoderStep, logits: Numbers, hidden_out: Numbers | None, group: NativeGroup | None
    ) -> None:
        sequences = PackedSequences.pack(
            step.query_starts, step.context_lengths, step.block_tables, block_size=self._spec.kv_cache.block_size
        )
        struct = structs.Step(
            step.num_tokens, len(step.wanted),
            *(address(each) for each in (step.token_ids, step.cos, step.sin, step.slots, step.wanted, logits)),
            sequences.struct, *(None if each is None else address(each) for each in (step.hidden_in, hidden_out)),
        )  # fmt: skip
        if group is None:
            self._call(struct, None)
        else:
            group.call(lambda handle: self._call(struct, handle))

    def _call(self, step: structs.Step, group: int | None) -> bool:
        """Whether it came to its end."""
        step.group = group
        if wrong := self._run(self._handle, ctypes.byref(step)):
            raise ValueError(f"native decoder: {wrong.decode()}")
        return not step.aborted


def address(array: Numbers) -> int:
    """Where a contiguous array begins."""
    assert array.flags.c_contiguous, f"needs contiguous memory, got strides {array.strides}"
    return array.ctypes.data


def matrix_struct(matrix: Matrix | None) -> structs.Matrix:
    """A matrix as C sees it; one without data for None."""
    if matrix is None:
        return structs.Matrix()
    kind = matrix.kind
    return structs.Matrix(
        matrix.address, kind.number, matrix.rows, matrix.columns, kind.group, _SCALES[kind.scale_dtype],
        kind.has_zeros, matrix.bias or None,
    )  # fmt: skip


def unsupported(spec: DecoderSpec) -> str | None:
    """What about a model the kernels do not compute; None if they do."""
    cache = spec.kv_cache
    heads = {"head_dim": cache.head_dim, "num_heads": spec.num_heads, "num_kv_heads": cache.num_kv_heads}
    if wrong := unsupported_shape(spec.dtype, **heads):
        return wrong
    if cache.dtype == "float32" != spec.dtype:
        return f"a KV cache of float32 for a model of {spec.dtype}"
    matrices = [matrix for layer in spec.layers for matrix in layer.matrices]
    matrices += [matrix for matrix in (spec.embedding, spec.head) if matrix is not None]
    if others := {matrix.dtype for matrix in matrices} - {spec.dtype}:
        return f"tensors of several dtypes ({', '.join(sorted(others | {spec.dtype}))})"
    return None


def unsupported_shape(dtype: str, *, head_dim: int, num_heads: int, num_kv_heads: int) -> str | None:
    """What about these sizes the kernels do not compute; None if they do."""
    if dtype not in DTYPES:
        return f"dtype {dtype} (float32 and bfloat16 are)"
    if head_dim % 2:
        return f"heads of {head_dim}, an odd number"
    if num_heads % num_kv_heads or num_heads // num_kv_heads > MAX_GROUP:
        return f"{num_heads} query heads on {num_kv_heads} KV heads"
    return None


def _layer(layer: LayerSpec) -> structs.Layer:
    return structs.Layer(
        layer.input_norm, *map(matrix_struct, (layer.query, layer.key, layer.value)), layer.query_norm, layer.key_norm,
        matrix_struct(layer.output), layer.post_norm, *map(matrix_struct, (layer.gate, layer.up, layer.down)),
        layer.window or 0,
    )  # fmt: skip
