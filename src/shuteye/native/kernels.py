"""The kernels one by one, on torch tensors: for tests, and for models that torch computes.

Every call is safe from any thread; calls are served one at a time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from shuteye.matrices.kinds import ROWS
from shuteye.matrices.matrix import Matrix
from shuteye.native import library as structs
from shuteye.native.decoder import CacheMemory, PackedSequences, matrix_struct
from shuteye.native.library import load

DTYPES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1}
"""What the kernels compute with, and the number csrc/types.h gives it."""

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def pointer(tensor: Tensor | None) -> int | None:
    """Where a contiguous tensor begins; None for None."""
    if tensor is None:
        return None
    assert tensor.is_contiguous(), f"needs contiguous memory, got strides {tensor.stride()}"
    return tensor.data_ptr()


def cache_memory(blocks: Tensor) -> CacheMemory:
    """A KV cache without scales, [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]."""
    num_blocks, num_layers, _, block_size, num_kv_heads, head_dim = blocks.shape
    dtype = str(blocks.dtype).removeprefix("torch.")
    return CacheMemory(pointer(blocks) or 0, dtype, num_blocks, num_layers, block_size, num_kv_heads, head_dim)


def _memory_of(cache: Tensor | CacheMemory) -> CacheMemory:
    return cache_memory(cache) if isinstance(cache, Tensor) else cache


def matrix_of(weight: Tensor, bias: Tensor | None = None) -> Matrix:
    """A row-major matrix [out, in] where a tensor lies; valid while that does."""
    rows, columns = weight.shape
    return Matrix(ROWS, rows, columns, _NAMES[weight.dtype], pointer(weight) or 0, pointer(bias) or 0)


def read(memory: Tensor) -> None:
    """Read a contiguous tensor and do nothing else: how fast the machine could be at best."""
    load().shuteye_read(pointer(memory), memory.nbytes)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    """`x` and `out` [..., width], `weight` [width]; rounded once, as torch does. `out` may be `x`."""
    width = weight.numel()
    load().shuteye_rms_norm(DTYPES[x.dtype], pointer(x), pointer(weight), eps, pointer(out), x.numel() // width, width)
    return out


def linear(x: Tensor, weight: Matrix | Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """A product, out = x @ weight.T + bias: `x` [num_tokens, in], `weight` [out, in], `out` [num_tokens, out].

    Args:
        bias: of a weight that is a tensor; a matrix has its own.
    """
    if isinstance(weight, Tensor):
        assert weight.dtype == x.dtype
        weight = matrix_of(weight, bias)
    assert x.shape[1] == weight.columns
    assert out.shape == (len(x), weight.rows)
    load().shuteye_linear(DTYPES[x.dtype], pointer(x), ctypes.byref(matrix_struct(weight)), pointer(out), len(x))
    return out


def embed(token_ids: Tensor, weight: Matrix, out: Tensor) -> Tensor:
    """Rows of a matrix of any kind: `token_ids` int64 [num_tokens], `out` [num_tokens, columns]."""
    assert token_ids.dtype == torch.int64
    assert out.shape == (len(token_ids), weight.columns)
    matrix = matrix_struct(weight)
    load().shuteye_embed(DTYPES[out.dtype], ctypes.byref(matrix), pointer(token_ids), len(token_ids), pointer(out))
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
    cache: Tensor | CacheMemory,
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
        cache: a tensor as `cache_memory` takes it, or any other.
        query_norm, key_norm: [head_dim], applied before the rotation.
    """
    blocks = _memory_of(cache).struct
    num_heads = qkv.shape[1] - 2 * blocks.num_kv_heads
    call = structs.Rope(
        DTYPES[qkv.dtype], qkv.shape[0], num_heads, layer, eps,
        *(pointer(tensor) for tensor in (qkv, query_norm, key_norm, cos, sin, slots)), blocks,
    )  # fmt: skip
    load().shuteye_rope_and_write(ctypes.byref(call))


def paged_attention(
    query: Tensor,
    cache: Tensor | CacheMemory,
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
        cache: a tensor as `cache_memory` takes it, or any other; this step's keys and values are in it.
        window: positions a query sees, itself included; None: all.
        out: contiguous [num_tokens, num_heads, head_dim]; made if not given.

    Raises:
        ValueError: tables or lengths do not fit together; the message says which.
    """
    assert query.stride()[1:] == (query.shape[2], 1), "heads must be adjacent"
    out = torch.empty(query.shape, dtype=query.dtype) if out is None else out
    blocks = _memory_of(cache).struct
    sequences = PackedSequences.pack(query_starts, context_lengths, block_tables, block_size=blocks.block_size)
    call = structs.Attention(
        DTYPES[query.dtype], query.shape[1], query.stride(0), layer, window or 0, scale,
        query.data_ptr(), pointer(out), blocks, sequences.struct, 0,
    )  # fmt: skip
    if wrong := load().shuteye_paged_attention(ctypes.byref(call), query.shape[0]):
        raise ValueError(f"paged attention: {wrong.decode()}")
    return out
