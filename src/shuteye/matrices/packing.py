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

from shuteye.matrices.ggml import IQ4_VALUES, Bytes, Parts, block_dtype, take_apart
from shuteye.matrices.kinds import BF16, UNIT_COLUMNS, MatrixKind

_ROWS = 16  # of a panel of a quantized kind
_VECTORS = UNIT_COLUMNS // 4  # of a unit: 4 columns of 16 rows each
_CHUNK_WEIGHTS = 1 << 17  # packed at once: what is made of them on the way fits into a second-level cache


@dataclass(frozen=True, slots=True)
class _Form:
    """How weights of a kind are made of integers.

    Attributes:
        planes: bits of each plane of a unit, lowest first; their sum is how many bits a weight has.
        zero: the integer that means 0, and that rows have which do not exist.
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
    planes = [(f"plane{index}", "u1", (64 * bits,)) for index, bits in enumerate(form.planes)]
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


# --- bfloat16 -----------------------------------------------------------------------------------------------------------


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


# --- quantized: into panels -----------------------------------------------------------------------------------------------


def pack_blocks(kind: MatrixKind, blocks: Bytes) -> Bytes:
    """Blocks [rows, bytes of a row], as they are in a GGUF file → panels of the same kind."""
    return _pack(
        kind, len(blocks), _columns_of(kind, blocks), lambda rows: take_apart(kind.name, _contiguous(blocks[rows]))
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
        units = _contiguous(u[rows]).reshape(rows.stop - rows.start, bits.shape[1], -1, UNIT_COLUMNS)
        return Parts(units, (bits[rows],))

    return _pack(kind, len(u), u.shape[1], parts, zeros)


def _contiguous(array: Bytes) -> Bytes:
    return np.ascontiguousarray(array)


def _columns_of(kind: MatrixKind, blocks: Bytes) -> int:
    num_blocks, left = divmod(blocks.shape[1], block_dtype(kind.name).itemsize)
    assert left == 0, f"rows of {blocks.shape[1]} bytes are no blocks of {kind.name}"
    return num_blocks * kind.block_columns


def _pack(
    kind: MatrixKind, num_rows: int, columns: int, parts_of: Callable[[slice], Parts], zeros: Bytes | None = None
) -> Bytes:
    form = _form(kind)
    out = np.zeros(kind.nbytes((num_rows, columns), "bfloat16"), np.uint8)
    panels = _panels(kind, out, columns)
    for chunk in _chunks(num_rows, columns, _ROWS):
        parts = parts_of(chunk)
        target = panels[chunk.start // _ROWS : -(-chunk.stop // _ROWS)]
        _put_planes(target["units"], _vectors(parts.u, len(target), form.zero), form.planes)
        for index, values in enumerate(parts.floats):
            _put(target["floats"][:, :, index], values)
        for index, scales in enumerate(parts.subs):
            _put(target["units"]["subs"][:, :, :, index], scales)
        if zeros is not None:
            _put(target["zeros"], zeros[chunk])
            last = target["zeros"][-1, :, (chunk.stop - chunk.start - 1) % _ROWS + 1 :]
            last[...] = form.zero
    return out


def _put(target: NDArray[Any], values: NDArray[Any]) -> None:
    """Numbers of rows [rows, …] go to [panels, …, 16]; what rows lack is left."""
    whole = len(values) // _ROWS
    shape = (whole, _ROWS, *values.shape[1:])
    target[:whole] = np.moveaxis(values[: whole * _ROWS].reshape(shape), 1, -1)
    if left := len(values) - whole * _ROWS:
        target[whole, ..., :left] = np.moveaxis(values[-left:], 0, -1)


def _vectors(u: Bytes, num_panels: int, zero: int) -> Bytes:
    """Integers [rows, blocks, units, 32] → [panels, blocks, units, 8, 64]: byte 4 r + c is row r, column 4 j + c."""
    _, blocks, units, _ = u.shape
    vectors = np.empty((num_panels, blocks, units, _VECTORS, _ROWS), np.uint32)
    if len(u) % _ROWS:
        vectors[-1] = zero * 0x01010101
    _put(vectors, u.view(np.uint32))
    return vectors.view(np.uint8)


def _put_planes(units: NDArray[np.void], vectors: Bytes, planes: Sequence[int]) -> None:
    """Cut the bits of vectors [panels, blocks, units, 8, 64] into planes."""
    shift = 0
    for index, bits in enumerate(planes):
        part = (vectors >> shift) & ((1 << bits) - 1) if len(planes) > 1 else vectors
        units[f"plane{index}"] = _PLANES[bits](part).reshape(*vectors.shape[:3], -1)
        shift += bits


def _bits_plane(part: Bytes) -> Bytes:
    return np.packbits(part, axis=-1, bitorder="little")


def _pairs_plane(part: Bytes) -> Bytes:
    """Vectors 4 p … 4 p + 3 in one byte, lowest bits first."""
    quads = part.reshape(*part.shape[:3], 2, 4, 64)
    return quads[..., 0, :] | quads[..., 1, :] << 2 | quads[..., 2, :] << 4 | quads[..., 3, :] << 6


def _nibbles_plane(part: Bytes) -> Bytes:
    """Vectors p and p + 4 in one byte."""
    return part[..., :4, :] | part[..., 4:, :] << 4


_PLANES: dict[int, Callable[[Bytes], Bytes]] = {
    1: _bits_plane,
    2: _pairs_plane,
    4: _nibbles_plane,
    8: lambda part: part,
}


# --- quantized: out of panels ---------------------------------------------------------------------------------------------


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
        u |= _vectors_of_plane(units[f"plane{index}"], bits) << shift
        shift += bits
    return u.reshape(*units.shape, 2, _VECTORS // 2, _ROWS, 4)


def _vectors_of_plane(plane: Bytes, bits: int) -> Bytes:
    """The inverse of `_PLANES`: [panels, blocks, units, 8, 64]."""
    if bits == 1:
        return np.unpackbits(plane, axis=-1, bitorder="little").reshape(*plane.shape[:3], _VECTORS, 64)
    parts = plane.reshape(*plane.shape[:3], bits, 64)
    if bits == 8:
        return parts
    if bits == 4:
        return np.concatenate((parts & 0x0F, parts >> 4), axis=3)
    return np.stack([parts >> shift & 3 for shift in (0, 2, 4, 6)], axis=4).reshape(*plane.shape[:3], _VECTORS, 64)


def _scales(kind: MatrixKind, panels: NDArray[np.void]) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Scale and minimum of each weight, in the axes of `_integers`, as short as can be."""
    floats = _as_float32(panels["floats"], kind.scale_dtype)[:, :, :, None, None, None, :, None]
    scale = floats[:, :, 0]
    if _form(kind).subs == 0:
        return scale, -floats[:, :, 1] if _form(kind).floats == 2 else None  # m is added: a + m is a - (-m), exactly
    subs = panels["units"]["subs"][:, :, :, :, None, :, None]
    if kind.name in ("q4_k", "q5_k"):
        return scale * subs[:, :, :, :1].astype(np.float32), floats[:, :, 1] * subs[:, :, :, 1:].astype(np.float32)
    if kind.name == "q2_k":
        return scale * (subs & 0x0F).astype(np.float32), floats[:, :, 1] * (subs >> 4).astype(np.float32)
    return scale * subs.view(np.int8).astype(np.float32), None


def _as_float32(bits: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    if dtype == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float16 if dtype == "f16" else np.float32).astype(np.float32)
