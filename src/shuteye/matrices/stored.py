"""Quantized matrices as checkpoints store them: parts of them can be taken, packed, and dequantized. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from shuteye.matrices.ggml import Bytes, block_dtype
from shuteye.matrices.kinds import MatrixKind
from shuteye.matrices.packing import pack_blocks, pack_groups, unpack


class StoredMatrix(Protocol):
    """A quantized matrix [rows, columns], whole or a part of one."""

    @property
    def kind(self) -> MatrixKind:
        """What it is once it is packed."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        ...

    def part(self, rows: slice, columns: slice) -> Self:
        """Some of its rows, and of its columns.

        Raises:
            ValueError: the columns are not whole blocks.
        """
        ...

    def packed(self) -> Bytes:
        """Its bytes in panels."""
        ...


def dequantized(stored: StoredMatrix) -> NDArray[np.float32]:
    """What it stands for, [rows, columns]."""
    return unpack(stored.kind, stored.packed(), *stored.shape)


@dataclass(frozen=True, slots=True)
class Blocks:
    """As GGUF files have it: `blocks` [rows, bytes of a row]."""

    kind: MatrixKind
    blocks: Bytes

    @property
    def shape(self) -> tuple[int, int]:
        """See `StoredMatrix`."""
        rows, nbytes = self.blocks.shape
        return rows, nbytes // block_dtype(self.kind.name).itemsize * self.kind.block_columns

    def part(self, rows: slice, columns: slice) -> Blocks:
        """See `StoredMatrix`."""
        first, end = _units(columns, self.shape[1], self.kind, self.kind.block_columns)
        nbytes = block_dtype(self.kind.name).itemsize
        return replace(self, blocks=self.blocks[rows, first * nbytes : end * nbytes])

    def packed(self) -> Bytes:
        """See `StoredMatrix`."""
        return pack_blocks(self.kind, self.blocks)


@dataclass(frozen=True, slots=True)
class Groups:
    """Integers `u` [rows, columns] with a scale, and perhaps a zero point, for each group: see `pack_groups`."""

    kind: MatrixKind
    u: Bytes
    scales: NDArray[Any]
    zeros: Bytes | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """See `StoredMatrix`."""
        rows, columns = self.u.shape
        return rows, columns

    def part(self, rows: slice, columns: slice) -> Groups:
        """See `StoredMatrix`; of a kind that has one scale for each row, columns may be cut anywhere units end."""
        if not self.kind.group:
            first, end = _units(columns, self.shape[1], self.kind, self.kind.block_columns)
            u = self.u[rows, first * self.kind.block_columns : end * self.kind.block_columns]
            return replace(self, u=u, scales=self.scales[rows], zeros=None if self.zeros is None else self.zeros[rows])
        first, end = _units(columns, self.shape[1], self.kind, self.kind.group)
        zeros = None if self.zeros is None else self.zeros[rows, first:end]
        u = self.u[rows, first * self.kind.group : end * self.kind.group]
        return replace(self, u=u, scales=self.scales[rows, first:end], zeros=zeros)

    def packed(self) -> Bytes:
        """See `StoredMatrix`."""
        return pack_groups(self.kind, self.u, self.scales, self.zeros)


def _units(columns: slice, num_columns: int, kind: MatrixKind, multiple: int) -> tuple[int, int]:
    """The same columns counted in blocks of `multiple`."""
    start, stop, step = columns.indices(num_columns)
    if step != 1 or start % multiple or stop % multiple:
        raise ValueError(f"columns [{start}, {stop}) of a matrix of {kind.name} are no whole blocks of {multiple}")
    return start // multiple, stop // multiple
