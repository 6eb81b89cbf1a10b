"""The kinds of weight matrices: in which order, and in how many bits, their numbers lie in memory. A table; no numpy.

A matrix has `rows` outputs and `columns` inputs. Kernels read panels of rows, one after the other; a panel is blocks of
columns in order, so that one panel is one stream. `csrc/types.h` has the same numbers, `docs/matrices.md` the bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from math import prod

UNIT_COLUMNS = 32
"""Columns of a unit: what quantized kinds have a scale for, or two; activations are quantized by as many."""

_QUANTIZED_ROWS = 16
_UNIT_WEIGHTS = _QUANTIZED_ROWS * UNIT_COLUMNS
_ITEM_NBYTES = {"float32": 4, "bfloat16": 2}
_SCALE_NBYTES = {"f32": 4, "bf16": 2, "f16": 2}
_SCALES = 2 * _QUANTIZED_ROWS  # bytes of a float16 for each row


@dataclass(frozen=True, slots=True)
class MatrixKind:
    """How a matrix lies in memory.

    Attributes:
        number: what csrc/types.h calls it.
        panel_rows: rows that lie together; those that the last panel lacks are zeros.
        block_columns: columns that lie together; of a quantized kind, columns must be a multiple of it.
        block_nbytes: of the blocks of a panel. 0 for `rows`, whose bytes its dtype says.
        group: columns that share a scale, of the kinds that let a checkpoint choose; 0: all of a row.
        scale_dtype: of their scales: `f32`, `bf16` or `f16`.
        has_zeros: whether they have a zero point for each scale.
    """

    name: str
    number: int
    panel_rows: int
    block_columns: int
    block_nbytes: int
    group: int = 0
    scale_dtype: str = "f16"
    has_zeros: bool = False

    @property
    def is_quantized(self) -> bool:
        """Whether its numbers are integers with scales."""
        return self.number > _BF16

    def nbytes(self, shape: tuple[int, ...], dtype: str) -> int:
        """Bytes of a matrix [rows, columns]; of `rows`, of any tensor.

        Raises:
            ValueError: the columns cannot be cut into this kind's blocks.
        """
        if self.number == _ROWS:
            return prod(shape) * _ITEM_NBYTES[dtype]
        rows, columns = shape
        if not self.fits(columns):
            raise ValueError(f"{columns} columns are no multiple of the {self.block_columns} of {self.name}")
        num_panels = -(-rows // self.panel_rows)
        if self.number in _GROUPED:
            group = self.group or columns
            per_panel = columns // group * self._header_nbytes + columns // UNIT_COLUMNS * self.block_nbytes
        else:
            per_panel = -(-columns // self.block_columns) * self.block_nbytes
        return num_panels * per_panel

    def fits(self, columns: int) -> bool:
        """Whether a matrix of so many columns can be of this kind."""
        if not self.is_quantized:
            return True
        return columns % self.block_columns == 0 and columns % (self.group or UNIT_COLUMNS) == 0

    @property
    def cut_columns(self) -> int:
        """Columns of a part of a matrix begin and end at multiples of this."""
        return max(self.block_columns, self.group) if self.is_quantized else 1

    @property
    def _header_nbytes(self) -> int:
        return _QUANTIZED_ROWS * (_SCALE_NBYTES[self.scale_dtype] + self.has_zeros)

    def bits_per_weight(self, columns: int) -> float:
        """Bits in memory for each weight, scales included."""
        return self.nbytes((self.panel_rows, columns), "bfloat16") * 8 / (self.panel_rows * columns)


_ROWS, _BF16, _INT4, _INT8 = 0, 1, 14, 15
_GROUPED = (_INT4, _INT8)

ROWS = MatrixKind("rows", _ROWS, 1, 1, 0)
"""Row after row, in the model's dtype: any tensor."""

BF16 = MatrixKind("bf16", _BF16, 32, 32, 32 * 32 * 2)
"""Panels of 32 rows, pairs of columns: [rows / 32][columns / 2][32][2] of bfloat16, columns padded to 32 with zeros."""


def _planes(*bits: int) -> int:
    """Bytes of a unit's planes."""
    return sum(_UNIT_WEIGHTS * each // 8 for each in bits)


def _unit_kind(name: str, number: int, *, floats: int, bits: tuple[int, ...]) -> MatrixKind:
    """Blocks of one unit, with `floats` float16 for each row."""
    return MatrixKind(name, number, _QUANTIZED_ROWS, UNIT_COLUMNS, floats * _SCALES + _planes(*bits))


def _super_kind(name: str, number: int, *, floats: int, sub_bytes: int, bits: tuple[int, ...]) -> MatrixKind:
    """Blocks of 256 columns: `floats` float16 for each row, then 8 units with `sub_bytes` bytes for each row."""
    unit = sub_bytes * _QUANTIZED_ROWS + _planes(*bits)
    return MatrixKind(name, number, _QUANTIZED_ROWS, 256, floats * _SCALES + 8 * unit)


KINDS: dict[str, MatrixKind] = {
    kind.name: kind
    for kind in (
        ROWS,
        BF16,
        _unit_kind("q8_0", 2, floats=1, bits=(8,)),
        _unit_kind("q4_0", 3, floats=1, bits=(4,)),
        _unit_kind("q4_1", 4, floats=2, bits=(4,)),
        _unit_kind("q5_0", 5, floats=1, bits=(4, 1)),
        _unit_kind("q5_1", 6, floats=2, bits=(4, 1)),
        _unit_kind("iq4_nl", 7, floats=1, bits=(4,)),
        _super_kind("q2_k", 8, floats=2, sub_bytes=2, bits=(2,)),
        _super_kind("q3_k", 9, floats=1, sub_bytes=2, bits=(2, 1)),
        _super_kind("q4_k", 10, floats=2, sub_bytes=2, bits=(4,)),
        _super_kind("q5_k", 11, floats=2, sub_bytes=2, bits=(4, 1)),
        _super_kind("q6_k", 12, floats=1, sub_bytes=2, bits=(4, 2)),
        _super_kind("iq4_xs", 13, floats=1, sub_bytes=1, bits=(4,)),
    )
}
"""All kinds but those whose groups a checkpoint chooses; `kind_of` knows these as well."""

_GROUPED_NAME = re.compile(r"(int4|int8)_(?:g([1-9]\d*)|row)_(f16|bf16|f32)(_zeros)?")


@cache
def kind_of(name: str) -> MatrixKind:
    """The kind of that name: one of `KINDS`, or such as `int4_g128_f16`, `int4_g32_bf16_zeros`, `int8_row_f32`.

    Raises:
        ValueError: there is no such kind.
    """
    if name in KINDS:
        return KINDS[name]
    match = _GROUPED_NAME.fullmatch(name)
    if match is None or (match[1] == "int8" and match[4]) or int(match[2] or UNIT_COLUMNS) % UNIT_COLUMNS:
        raise ValueError(f"{name!r} is no kind of matrix; expected {', '.join(KINDS)}, or such as int4_g128_f16")
    number, bits = (_INT4, 4) if match[1] == "int4" else (_INT8, 8)
    return MatrixKind(
        name, number, _QUANTIZED_ROWS, UNIT_COLUMNS, _planes(bits), int(match[2] or 0), match[3], bool(match[4])
    )
