"""Random quantized matrices, and what their products must be: the kernels' own arithmetic in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shuteye import native
from shuteye.matrices.ggml import block_dtype
from shuteye.matrices.kinds import KINDS, MatrixKind, kind_of
from shuteye.matrices.matrix import Matrix
from shuteye.matrices.packing import pack_blocks, pack_groups, unpack

BLOCK_NAMES = tuple(name for name, kind in KINDS.items() if kind.is_quantized)
GROUP_NAMES = (
    "int4_g32_f16",
    "int4_row_f32",
    "int4_g64_bf16_zeros",
    "int4_g128_f16_zeros",
    "int8_row_bf16",
    "int8_g32_f32",
)
NAMES = BLOCK_NAMES + GROUP_NAMES


@dataclass(frozen=True, slots=True)
class Quantized:
    """A matrix in memory that it keeps alive, and the weights that it stands for, [rows, columns] of float32."""

    matrix: Matrix
    memory: NDArray[np.uint8]
    weights: NDArray[np.float32]

    @classmethod
    def random(cls, name: str, rows: int, columns: int, *, seed: int = 0, fill: int | None = None) -> Quantized:
        """Any bytes, scales up to 0.02 of either sign; with `fill`, all bytes but the scales are alike."""
        kind, generator = kind_of(name), np.random.default_rng(seed)
        memory = _packed(kind, rows, columns, fill, generator)
        return cls(
            Matrix(kind, rows, columns, "float32", memory.ctypes.data), memory, unpack(kind, memory, rows, columns)
        )

    def linear(self, x: Tensor) -> Tensor:
        """The native product."""
        out = torch.full((len(x), self.matrix.rows), torch.nan, dtype=x.dtype)
        return native.linear(x, self.matrix, None, out)

    def assert_linear(self, x: Tensor) -> None:
        """The native product of float32 is that of the tokens as int8, but for the rounding of float32's sums."""
        numbers = quantized_tokens(x.numpy())
        weights = self.weights.astype(np.float64)
        exact, magnitudes = numbers @ weights.T, np.abs(numbers) @ np.abs(weights).T
        error = np.abs(self.linear(x).numpy() - exact)
        units = x.shape[1] / 32
        # Where u has an offset, sums are of larger numbers than their products: by 16 at most.
        allowed = magnitudes * 2.0**-24 * (units + 4) + np.abs(numbers).sum(1)[:, None] * 0.02 * 256 * 2.0**-24
        worst = (error - allowed).argmax()
        assert np.all(error <= allowed), f"{error.flat[worst]} of {exact.flat[worst]}, allowed {allowed.flat[worst]}"


def quantized_tokens(x: NDArray[np.float32]) -> NDArray[np.float64]:
    """What the kernels take a token for: whole numbers of at most 127 times a scale, for each 32 columns."""
    units = x.reshape(len(x), -1, 32)
    largest = np.abs(units).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), largest, where=largest > 0, out=np.zeros_like(largest))
    scale = (largest / np.float32(127)).astype(np.float64)
    return (np.rint(units * inverse) * scale).reshape(x.shape)


def _packed(
    kind: MatrixKind, rows: int, columns: int, fill: int | None, generator: np.random.Generator
) -> NDArray[np.uint8]:
    def some_bytes(*shape: int, below: int = 256) -> NDArray[np.uint8]:
        if fill is not None:
            return np.full(shape, fill % below, np.uint8)
        return generator.integers(0, below, shape, np.uint8)

    if kind.name in BLOCK_NAMES:
        dtype = block_dtype(kind.name)
        blocks = some_bytes(rows, columns // kind.block_columns * dtype.itemsize)
        typed = blocks.view(dtype)
        for field in {"d", "m"} & set(dtype.names or ()):
            typed[field].view(np.float16)[...] = generator.uniform(-0.02, 0.02, typed[field].view(np.float16).shape)
        return pack_blocks(kind, blocks)
    groups = columns // (kind.group or columns)
    below = 16 if kind.name.startswith("int4") else 256
    scales = generator.uniform(-0.02, 0.02, (rows, groups)).astype(np.float32)
    if kind.scale_dtype == "bf16":
        typed_scales: NDArray[np.generic] = (scales.view(np.uint32) >> 16).astype(np.uint16)
    else:
        typed_scales = scales.astype(np.float16 if kind.scale_dtype == "f16" else np.float32)
    zeros = some_bytes(rows, groups, below=16) if kind.has_zeros else None
    return pack_groups(kind, some_bytes(rows, columns, below=below), typed_scales, zeros)
