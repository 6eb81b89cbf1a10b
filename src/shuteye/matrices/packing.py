"""Matrices into panels and out of them again, exactly: the bytes of `docs/matrices.md`, by numpy.

Whatever is packed a few panels at a time, so that a large matrix needs little memory beside itself. Rows may be packed
in pieces: pieces that begin with a panel follow one another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shuteye.matrices.ggml import IQ4_VALUES, Bytes, Parts, bits_of, block_dtype, joined, take_apart
from shuteye.matrices.kinds import BF16, UNIT_COLUMNS, MatrixKind

_ROWS = 16  # of a panel of a quantized kind
_VECTORS = UNIT_COLUMNS // 4  # of a unit: 4 columns of 16 rows each
_CHUNK_WEIGHTS = 1 << 17  # packed at once: what is made of them on the way fits into a second-level cache


@dataclass(frozen=True, slots=True)
class _Form:
    """How weights of a kind are made of integers.

    Attributes:
        planes: bits of each plane of a unit, lowest first; their sum is how many bits a weight has.
        zero: the integer that means 0, where no zero points are.
        floats, subs: floats of a block, bytes of a unit, for each row.
    """

    planes: tuple[int, ...]
    zero: int
    floats: int = 1
    subs: int = 0


_FORMS = {
    "q8_0": _Form((8,), 128),
    "q4_0": _Form((4,), 8),
    "q4_1": _Form((4,), 0, floats=2),
    "q5_0": _Form((4, 1), 16),
    "q5_1": _Form((4, 1), 0, floats=2),
    "iq4_nl": _Form((4,), 0),
    "q2_k": _Form((2,), 0, floats=2, subs=2),
    "q3_k": _Form((2, 1), 4, subs=2),
    "q4_k": _Form((4,), 0, floats=2, subs=2),
    "q5_k": _Form((4, 1), 0, floats=2, subs=2),
    "q6_k": _Form((4, 2), 32, subs=2),
    "iq4_xs": _Form((4,), 0, subs=1),
    "int4": _Form((4,), 8),
    "int8": _Form((8,), 128),
}

_FLOATS = {"f16": "<u2", "bf16": "<u2", "f32": "<u4"}


def _form(kind: MatrixKind) -> _Form:
    return _FORMS[kind.name if kind.name in _FORMS else kind.name.partition("_")[0]]


@cache
def _block_dtype(kind: MatrixKind, columns: int) -> np.dtype[np.void]:
    """One block of a panel."""
    form = _form(kind)
    planes = [(f"plane{index}", "<u4", (bits, _ROWS)) for index, bits in enumerate(form.planes)]
    unit = np.dtype([("subs", "u1", (form.subs, _ROWS)), *planes])
    fields: list[Any] = [("floats", _FLOATS[kind.scale_dtype], (form.floats, _ROWS))]
    if kind.has_zeros:
        fields.append(("zeros", "u1", (_ROWS,)))
    dtype = np.dtype([*fields, ("units", unit, (_block_columns(kind, columns) // UNIT_COLUMNS,))])
    num_blocks = columns // _block_columns(kind, columns)
    assert num_blocks * dtype.itemsize == kind.nbytes((_ROWS, columns), "bfloat16"), f"{kind.name} has other bytes"
    return dtype


def _block_columns(kind: MatrixKind, columns: int) -> int:
    """Columns of a block; of grouped kinds that is a group."""
    return (kind.group or columns) if _is_grouped(kind) else kind.block_columns


def _is_grouped(kind: MatrixKind) -> bool:
    return kind.name not in _FORMS


def _panels(kind: MatrixKind, memory: Bytes, columns: int) -> NDArray[np.void]:
    """Blocks [panels, blocks] of a quantized matrix in memory."""
    dtype = _block_dtype(kind, columns)
    return memory.view(dtype).reshape(-1, columns // _block_columns(kind, columns))


def _chunks(num_rows: int, columns: int, panel_rows: int) -> Iterator[slice]:
    """Rows to be packed together: whole panels, the last one perhaps short."""
    step = panel_rows * max(1, _CHUNK_WEIGHTS // (panel_rows * columns))
    for first in range(0, num_rows, step):
        yield slice(first, min(first + step, num_rows))


# --- bfloat16 -------------------------------------------------------------------------------------


def pack_bf16(rows: NDArray[np.uint16]) -> Bytes:
    """Bits of bfloat16 [rows, columns] → panels of kind `bf16`."""
    num_rows, columns = rows.shape
    out = np.zeros(BF16.nbytes(rows.shape, "bfloat16"), np.uint8)
    panels = _bf16_panels(out, columns)
    for chunk in _chunks(num_rows, columns, BF16.panel_rows):
        part = rows[chunk]
        if columns % 2:
            part = np.pad(part, ((0, 0), (0, 1)))
        pairs = np.ascontiguousarray(part).view(np.uint32)
        for first in range(0, len(pairs), BF16.panel_rows):
            panel = pairs[first : first + BF16.panel_rows]
            panels[(chunk.start + first) // BF16.panel_rows, : panel.shape[1], : len(panel)] = panel.T
    return out


def unpack_bf16(memory: Bytes, rows: int, columns: int) -> NDArray[np.uint16]:
    """Panels of kind `bf16` → bits of bfloat16 [rows, columns]."""
    panels = _bf16_panels(memory, columns)
    pairs = np.ascontiguousarray(panels.transpose(0, 2, 1)).reshape(-1, panels.shape[1])
    return np.ascontiguousarray(pairs.view(np.uint16)[:rows, :columns])


def _bf16_panels(memory: Bytes, columns: int) -> NDArray[np.uint32]:
    """Pairs of bfloat16 [panels, pairs, 32]."""
    pairs = -(-columns // BF16.block_columns) * BF16.block_columns // 2
    return memory.view(np.uint32).reshape(-1, pairs, BF16.panel_rows)


# --- quantized: into panels -----------------------------------------------------------------------


def pack_blocks(kind: MatrixKind, blocks: Bytes) -> Bytes:
    """Blocks [rows, bytes of a row], as they are in a GGUF file → panels of the same kind."""
    return _pack(
        kind,
        len(blocks),
        _columns_of(kind, blocks),
        lambda rows: take_apart(kind.name, np.ascontiguousarray(blocks[rows])),
    )


def pack_groups(kind: MatrixKind, u: Bytes, scales: NDArray[np.generic], zeros: Bytes | None = None) -> Bytes:
    """Integers with a scale for each group of columns → panels of a kind such as `int4_g128_f16`.

    Args:
        u: [rows, columns], 0…15 or 0…255.
        scales: [rows, groups]: float32 or float16, or the bits of bfloat16, as the kind says.
        zeros: which integer means 0 [rows, groups], if the kind has them.
    """
    expected = {"f16": (np.float16, np.uint16), "bf16": (np.uint16,), "f32": (np.float32, np.uint32)}[kind.scale_dtype]
    assert scales.dtype in expected, f"scales of {kind.name} are {scales.dtype}"
    assert (zeros is not None) == kind.has_zeros, f"{kind.name} with{'out' if zeros is None else ''} zeros"
    bits = scales.view(_FLOATS[kind.scale_dtype])

    def parts(rows: slice) -> Parts:
        units = np.ascontiguousarray(u[rows]).reshape(rows.stop - rows.start, bits.shape[1], -1, UNIT_COLUMNS)
        if _form(kind).planes == (4,):
            units = joined(units[..., :16], units[..., 16:], 4)
        return Parts((units,), (bits[rows],))

    return _pack(kind, len(u), u.shape[1], parts, zeros)


def _columns_of(kind: MatrixKind, blocks: Bytes) -> int:
    num_blocks, left = divmod(int(blocks.shape[1]), block_dtype(kind.name).itemsize)
    assert left == 0, f"rows of {blocks.shape[1]} bytes are no blocks of {kind.name}"
    return num_blocks * kind.block_columns


def _pack(
    kind: MatrixKind, num_rows: int, columns: int, parts_of: Callable[[slice], Parts], zeros: Bytes | None = None
) -> Bytes:
    out = np.zeros(kind.nbytes((num_rows, columns), "bfloat16"), np.uint8)
    panels = _panels(kind, out, columns)
    for chunk in _chunks(num_rows, columns, _ROWS):
        parts = parts_of(chunk)
        target = panels[chunk.start // _ROWS : -(-chunk.stop // _ROWS)]
        for index, plane in enumerate(parts.planes):
            _put_plane(target["units"][f"plane{index}"], plane)
        for index, values in enumerate(parts.floats):
            _put(target["floats"][:, :, index], values)
        for index, scales in enumerate(parts.subs):
            _put(target["units"]["subs"][:, :, :, index], scales)
        if zeros is not None:
            _put(target["zeros"], zeros[chunk])
    return out


def _put(target: NDArray[Any], values: NDArray[Any]) -> None:
    """Numbers of rows [rows, …] go to [panels, …, 16]; what rows lack is left."""
    whole = len(values) // _ROWS
    shape = (whole, _ROWS, *values.shape[1:])
    target[:whole] = np.moveaxis(values[: whole * _ROWS].reshape(shape), 1, -1)
    if left := len(values) - whole * _ROWS:
        target[whole, ..., :left] = np.moveaxis(values[-left:], 0, -1)


def _put_plane(target: NDArray[np.uint32], plane: Bytes) -> None:
    """Bytes [rows, blocks, units, 4 x bits] → [panels, blocks, units, bits, 16]: words of 4 columns of each row.

    Of one bit, words have two rows each, 4 columns of both in one byte.
    """
    if plane.shape[-1] > 4:
        return _put(target, np.ascontiguousarray(plane).view(np.uint32))
    by_row = np.empty((*target.shape[:3], 4, _ROWS), np.uint8)
    _put(by_row, plane)
    even, odd = np.ascontiguousarray(by_row[..., 0::2]), np.ascontiguousarray(by_row[..., 1::2])
    words = target.view(np.uint8).reshape(*target.shape[:3], 4, 2, _ROWS // 2)
    words[..., 0, :] = joined(even & np.uint8(0x0F), odd, 4)
    words[..., 1, :] = bits_of(even, 4, 4) | odd & np.uint8(0xF0)
    return None


# --- quantized: out of panels ---------------------------------------------------------------------


def unpack(kind: MatrixKind, memory: Bytes, rows: int, columns: int) -> NDArray[np.float32]:
    """What a packed matrix stands for [rows, columns]: of a GGUF file, bit for bit what its blocks stand for."""
    out = np.empty((rows, columns), np.float32)
    if kind is BF16:
        np.left_shift(unpack_bf16(memory, rows, columns), np.uint32(16), out=out.view(np.uint32), casting="unsafe")
        return out
    panels = _panels(kind, memory, columns)
    for chunk in _chunks(rows, columns, _ROWS):
        found = _weights(kind, panels[chunk.start // _ROWS : -(-chunk.stop // _ROWS)])
        out[chunk] = found.reshape(-1, columns)[: chunk.stop - chunk.start]
    return out


def unpack_rows(
    kind: MatrixKind, memory: Bytes, rows: int, columns: int, indices: NDArray[np.integer[Any]]
) -> NDArray[np.float32]:
    """Some rows of a packed matrix [len(indices), columns], such as embeddings."""
    assert len(indices) == 0 or (indices.min() >= 0 and indices.max() < rows), f"of {rows} rows: {indices}"
    out = np.empty((len(indices), columns), np.float32)
    panels = memory.reshape(-1, kind.nbytes((kind.panel_rows, columns), "bfloat16"))
    for chunk in _chunks(len(indices), columns, 1):
        panel, row = np.divmod(indices[chunk], kind.panel_rows)
        some = unpack(kind, panels[panel].reshape(-1), len(panel) * kind.panel_rows, columns)
        out[chunk] = some[np.arange(len(panel)) * kind.panel_rows + row]
    return out


def _weights(kind: MatrixKind, panels: NDArray[np.void]) -> NDArray[np.float32]:
    """Panels [panels, blocks] → [panels, 16, blocks, units, 32]; scale x (u - zero) - minimum, in this order."""
    units = panels["units"]
    u = _integers(units, _form(kind).planes)
    if kind.name.startswith("iq4"):
        weights = IQ4_VALUES[u].astype(np.float32)
    elif kind.has_zeros:
        weights = u.astype(np.float32)
        weights -= panels["zeros"][:, :, None, None, None, :, None]
    else:
        weights = u.astype(np.float32)
        weights -= _form(kind).zero
    scale, minimum = _scales(kind, panels)
    weights *= scale
    if minimum is not None:
        weights -= minimum
    num_panels, blocks, num_units = u.shape[:3]
    return np.moveaxis(weights, 5, 1).reshape(num_panels, _ROWS, blocks, num_units, UNIT_COLUMNS)


def _integers(units: NDArray[np.void], planes: Sequence[int]) -> Bytes:
    """Planes → [panels, blocks, units, halves, vectors of a half, rows, columns of a vector]."""
    u = np.zeros((*units.shape, _VECTORS, 64), np.uint8)
    shift = 0
    for index, bits in enumerate(planes):
        u = joined(u, _vectors_of(units[f"plane{index}"].view(np.uint8), bits), shift)
        shift += bits
    return u.reshape(*units.shape, 2, _VECTORS // 2, _ROWS, 4)


def _vectors_of(plane: Bytes, bits: int) -> Bytes:
    """Plane [panels, blocks, units, bits, 64] → numbers of so many bits [panels, blocks, units, 8, 64]."""
    shape = (*plane.shape[:3], _VECTORS, 64)
    if bits == 1:
        return np.unpackbits(plane, axis=-1, bitorder="little").reshape(shape)
    if bits == 2:
        return np.stack([bits_of(plane, shift, 2) for shift in (0, 2, 4, 6)], axis=4).reshape(shape)
    return plane if bits == 8 else np.concatenate((bits_of(plane, 0, 4), bits_of(plane, 4, 4)), axis=3)


def _scales(kind: MatrixKind, panels: NDArray[np.void]) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Scale and minimum of each weight, in the axes of `_integers`, as short as can be."""
    floats = as_float32(panels["floats"], kind.scale_dtype)[:, :, :, None, None, None, :, None]
    scale = floats[:, :, 0]
    if _form(kind).subs == 0:
        return scale, -floats[:, :, 1] if _form(kind).floats == 2 else None  # m is added: a + m is a - (-m), exactly
    subs = panels["units"]["subs"][:, :, :, :, None, :, None]
    if kind.name in ("q4_k", "q5_k"):
        return scale * subs[:, :, :, :1].astype(np.float32), floats[:, :, 1] * subs[:, :, :, 1:].astype(np.float32)
    if kind.name == "q2_k":
        return scale * (subs & 0x0F).astype(np.float32), floats[:, :, 1] * (subs >> 4).astype(np.float32)
    return scale * subs.view(np.int8).astype(np.float32), None


def as_float32(bits: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Numbers of the dtype `f32`, `f16` or `bf16`, given as the unsigned integers that they are stored as."""
    if dtype == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float16 if dtype == "f16" else np.float32).astype(np.float32)
