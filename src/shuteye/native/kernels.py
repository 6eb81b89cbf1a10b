"""The kernels one by one, on torch tensors: for tests, and for steps too large for `NativeDecoder`.

Every call is safe from any thread; calls are served one at a time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from shuteye.native import library as structs
from shuteye.native.library import load

DTYPES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1}
"""What the kernels compute with, and the number csrc/types.h gives it."""


def pointer(tensor: Tensor | None) -> int | None:
    """Where a contiguous tensor begins; None for None."""
    if tensor is None:
        return None
    assert tensor.is_contiguous(), f"needs contiguous memory, got strides {tensor.stride()}"
    return tensor.data_ptr()


def cache_struct(blocks: Tensor) -> structs.Cache:
    """A KV cache [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim] as C sees it."""
    num_blocks, num_layers, _, block_size, num_kv_heads, head_dim = blocks.shape
    return structs.Cache(pointer(blocks), num_blocks, num_layers, block_size, num_kv_heads, head_dim)


@dataclass(frozen=True, slots=True)
class PackedSequences:
    """A batch's sequences as arrays; `struct` points into them."""

    struct: structs.Sequences
    arrays: tuple[np.ndarray[tuple[int], np.dtype[np.int64]], ...]

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
        return cls(structs.Sequences(len(used), *(array.ctypes.data for array in arrays)), arrays)


def read(memory: Tensor) -> None:
    """Read a contiguous tensor and do nothing else: how fast the machine could be at best."""
    load().shuteye_read(pointer(memory), memory.nbytes)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    """`x` and `out` [..., width], `weight` [width]; rounded once, as torch does. `out` may be `x`."""
    width = weight.numel()
    load().shuteye_rms_norm(DTYPES[x.dtype], pointer(x), pointer(weight), eps, pointer(out), x.numel() // width, width)
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """A product, out = x @ weight.T + bias: `x` [num_tokens, in], `weight` [out, in], `out` [num_tokens, out]."""
    (num_tokens, width), rows = x.shape, weight.shape[0]
    assert weight.shape[1] == width
    assert out.shape == (num_tokens, rows)
    load().shuteye_linear(
        DTYPES[x.dtype], pointer(x), pointer(weight), pointer(bias), pointer(out), num_tokens, width, rows
    )
    return out


def silu_mul(gate_up: Tensor, out: Tensor) -> Tensor:
    """Gated SiLU, out = silu(gate) * up: `gate_up` [num_tokens, 2 * width], `out` [num_tokens, width]."""
    rows, width = out.shape
    load().shuteye_silu_mul(DTYPES[out.dtype], pointer(gate_up), pointer(out), rows, width)
    return out


def rope_and_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    cache: Tensor,
    *,
    layer: int,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Rotate the query heads in place; normalise, rotate and store keys; store values.

    Args:
        qkv: [num_tokens, num_heads + 2 * num_kv_heads, head_dim].
        cos, sin: [num_tokens, head_dim], as transformers' rotary embedding gives them.
        slots: int64 [num_tokens].
        cache: [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim].
        query_norm, key_norm: [head_dim], applied before the rotation.
    """
    blocks = cache_struct(cache)
    num_heads = qkv.shape[1] - 2 * blocks.num_kv_heads
    call = structs.Rope(
        DTYPES[qkv.dtype], qkv.shape[0], num_heads, layer, eps,
        *(pointer(tensor) for tensor in (qkv, query_norm, key_norm, cos, sin, slots)), blocks,
    )  # fmt: skip
    load().shuteye_rope_and_write(ctypes.byref(call))


def paged_attention(
    query: Tensor,
    cache: Tensor,
    query_starts: Sequence[int],
    context_lengths: Sequence[int],
    block_tables: Sequence[Sequence[int]],
    *,
    layer: int,
    scale: float,
    window: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Causal attention of each sequence's last tokens over its context, read from the blocks as they lie.

    Args:
        query: [num_tokens, num_heads, head_dim]; tokens may be strided, heads not.
        cache: [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim], this step's keys and values included.
        window: positions a query sees, itself included; None: all.
        out: contiguous [num_tokens, num_heads, head_dim]; made if not given.

    Raises:
        ValueError: tables or lengths do not fit together; the message says which.
    """
    assert query.stride()[1:] == (query.shape[2], 1), "heads must be adjacent"
    out = torch.empty(query.shape, dtype=query.dtype) if out is None else out
    blocks = cache_struct(cache)
    sequences = PackedSequences.pack(query_starts, context_lengths, block_tables, block_size=blocks.block_size)
    call = structs.Attention(
        DTYPES[query.dtype], query.shape[1], query.stride(0), layer, window or 0, scale,
        query.data_ptr(), pointer(out), blocks, sequences.struct, 0,
    )  # fmt: skip
    if wrong := load().shuteye_paged_attention(ctypes.byref(call), query.shape[0]):
        raise ValueError(f"paged attention: {wrong.decode()}")
    return out
