"""Row-major matrices of bfloat16 as panels, by another way than the package's own; see docs/matrices.md."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np

from shuteye.matrices.kinds import BF16
from shuteye.matrices.matrix import Matrix
from shuteye.native import DecoderSpec, LayerSpec


def panels_of(rows: np.ndarray) -> np.ndarray:
    """uint16 [N, K] → [ceil(N / 32), ceil(K / 32) * 16, 32, 2]; what does not exist is zero."""
    num_rows, columns = rows.shape
    padded = np.zeros((-(-num_rows // 32) * 32, -(-columns // 32) * 32), np.uint16)
    padded[:num_rows, :columns] = rows
    return np.ascontiguousarray(padded.reshape(-1, 32, padded.shape[1] // 2, 2).transpose(0, 2, 1, 3))


class Panels:
    """Keeps the memory of the matrices that it makes."""

    def __init__(self) -> None:
        self._memory: list[np.ndarray] = []

    def of(self, rows: Matrix) -> Matrix:
        """The same matrix as panels, where it is one of bfloat16."""
        if rows.dtype != "bfloat16":
            return rows
        source = (ctypes.c_uint16 * (rows.rows * rows.columns)).from_address(rows.address)
        self._memory.append(panels_of(np.frombuffer(source, np.uint16).reshape(rows.rows, rows.columns)))
        assert self._memory[-1].nbytes == BF16.nbytes((rows.rows, rows.columns), rows.dtype)
        return replace(rows, kind=BF16, address=self._memory[-1].ctypes.data)

    def of_layer(self, layer: LayerSpec, names: tuple[str, ...]) -> LayerSpec:
        """The named matrices of a layer."""
        return replace(layer, **{name: self.of(getattr(layer, name)) for name in names})

    def of_decoder(self, spec: DecoderSpec) -> DecoderSpec:
        """All matrices, but of one layer only some: kinds are mixed there as in no other."""
        every, some = ("query", "key", "value", "output", "gate", "up", "down"), ("key", "up", "output")
        layers = [self.of_layer(layer, some if index == 1 else every) for index, layer in enumerate(spec.layers)]
        embedding, head = (None if matrix is None else self.of(matrix) for matrix in (spec.embedding, spec.head))
        return replace(spec, layers=tuple(layers), embedding=embedding, head=head)
