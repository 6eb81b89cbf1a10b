"""The quantized blocks of GGUF files: which bytes of a block are scales, minima and the bits of its weights.

Facts: ggml/src/ggml-common.h (`block_q4_K` and its like) and `gguf.quants`, which is what tests compare with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shuteye.matrices.kinds import UNIT_COLUMNS

Bytes = NDArray[np.uint8]

IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
"""What the 4-bit numbers of iq4_nl and iq4_xs stand for."""

_D = ("d", "<u2")
_SUPER = 256 // UNIT_COLUMNS  # units of a block of 256 columns

_FIELDS: dict[str, list[tuple[str, str] | tuple[str, str, int]]] = {
    "q8_0": [_D, ("q", "u1", 32)],
    "q4_0": [_D, ("q", "u1", 16)],
    "q4_1": [_D, ("m", "<u2"), ("q", "u1", 16)],
    "q5_0": [_D, ("high", "u1", 4), ("q", "u1", 16)],
    "q5_1": [_D, ("m", "<u2"), ("high", "u1", 4), ("q", "u1", 16)],
    "iq4_nl": [_D, ("q", "u1", 16)],
    "q2_k": [("scales", "u1", 16), ("q", "u1", 64), _D, ("m", "<u2")],
    "q3_k": [("high", "u1", 32), ("q", "u1", 64), ("scales", "u1", 12), _D],
    "q4_k": [_D, ("m", "<u2"), ("scales", "u1", 12), ("q", "u1", 128)],
    "q5_k": [_D, ("m", "<u2"), ("scales", "u1", 12), ("high", "u1", 32), ("q", "u1", 128)],
    "q6_k": [("q", "u1", 128), ("high", "u1", 64), ("scales", "u1", 16), _D],
    "iq4_xs": [_D, ("scales_high", "u1", 2), ("scales", "u1", 4), ("q", "u1", 128)],
}


@dataclass(frozen=True, slots=True)
class Parts:
    """What blocks are made of, taken apart.

    Attributes:
        planes: some bits of each weight, 4 bytes of a row and unit for each bit, lowest bits first. Of 8 bits: a
            byte is a column. Of 4: low nibbles are columns 0 to 15, high ones 16 to 31. Of 2: bits 2 i of byte
            4 p + c are column 16 p + 4 i + c. Of 1: bit k is column k. Each [rows, blocks, units, bytes].
        floats: float16 of each block, as the bits they are: scale, and minimum if there is one [rows, blocks] each.
        subs: scales within the blocks, and minima, as the bytes that they have in memory [rows, blocks, units] each.
    """

    planes: tuple[Bytes, ...]
    floats: tuple[NDArray[Any], ...]
    subs: tuple[Bytes, ...] = ()


@cache
def block_dtype(name: str) -> np.dtype[np.void]:
    """One block of a GGUF file, of the kind of that name."""
    return np.dtype(_FIELDS[name])


def is_finite(name: str, blocks: Bytes) -> bool:
    """Whether all scales and minima of blocks [rows, bytes] are numbers."""
    typed = blocks.view(block_dtype(name))
    return not any(bool(np.any((typed[field] & 0x7C00) == 0x7C00)) for field in ("d", "m") if field in _fields(name))


def take_apart(name: str, blocks: Bytes) -> Parts:
    """The parts of blocks [rows, bytes], as they are in a GGUF file."""
    typed = blocks.view(block_dtype(name))
    floats = tuple(typed[field] for field in ("d", "m") if field in _fields(name))
    scales = _SUB_SCALES.get(name)
    return Parts(_PLANES[name](typed), floats, () if scales is None else scales(typed))


def _fields(name: str) -> tuple[str, ...]:
    return block_dtype(name).names or ()


# --- the weights, from blocks [rows, blocks] ------------------------------------------------------


def bits_of(values: Bytes, first: int, count: int) -> Bytes:
    """`count` bits of each byte, from bit `first` on."""
    found: Bytes = np.right_shift(values, np.uint8(first)) & np.uint8((1 << count) - 1)
    return found


def joined(low: Bytes, high: Bytes, shift: int) -> Bytes:
    """Bytes that have the bits of `high` above the `shift` bits of `low`."""
    found: Bytes = low | np.left_shift(high, np.uint8(shift))
    return found


def _as_stored(blocks: NDArray[np.void]) -> tuple[Bytes, ...]:
    """Files have these planes as they are here."""
    planes = (blocks["q"], blocks["high"]) if "high" in (blocks.dtype.names or ()) else (blocks["q"],)
    return tuple(plane.reshape(*blocks.shape, -1, 4 * bits) for plane, bits in zip(planes, (4, 1), strict=False))


def _q8_0(blocks: NDArray[np.void]) -> tuple[Bytes, ...]:
    return (np.bitwise_xor(blocks["q"], np.uint8(0x80))[:, :, None],)


# Below, arrays are flat and elements as wide as what stays together: many short rows are what numpy is slow at.


def _nibbles(stored: Bytes) -> tuple[Bytes, Bytes]:
    """Strips of 32 bytes, of which low nibbles are a unit, and high ones another → both [strips, 16]."""
    halves = np.ascontiguousarray(stored).view(np.complex128).reshape(-1, 2)  # 16 bytes each
    first, second = (np.ascontiguousarray(halves[:, half]).view(np.uint8) for half in (0, 1))
    low, high = joined(first & np.uint8(0x0F), second, 4), bits_of(first, 4, 4) | second & np.uint8(0xF0)
    return low.reshape(-1, 16), high.reshape(-1, 16)


def _pairs(stored: Bytes) -> Bytes:
    """Strips of 32 bytes, in which two bits are of each of four units → [rows, blocks, units, 8]."""
    words = np.ascontiguousarray(stored).view(np.uint32).reshape(-1, 4)
    vectors = [np.ascontiguousarray(words[:, index]).view(np.uint8) for index in range(4)]
    planes = np.empty((len(words) // 2, 4), np.uint64)
    for unit in range(4):
        one, two, three, four = (bits_of(vector, 2 * unit, 2) for vector in vectors)
        planes[:, unit] = joined(joined(one, two, 2), joined(three, four, 2), 4).view(np.uint64)
    return planes.view(np.uint8).reshape(*stored.shape[:2], -1, 8)


def _bits(stored: Bytes) -> Bytes:
    """32 bytes, in which a bit is of each of eight units → [rows, blocks, units, 4]."""
    columns = np.ascontiguousarray(stored).reshape(-1)
    planes = np.empty((len(columns) // UNIT_COLUMNS, _SUPER), np.uint32)
    for unit in range(_SUPER):
        planes[:, unit] = np.packbits(columns & np.uint8(1 << unit), bitorder="little").view(np.uint32)
    return planes.view(np.uint8).reshape(*stored.shape[:2], _SUPER, 4)


def _q4_k(blocks: NDArray[np.void]) -> tuple[Bytes, ...]:
    """A strip is two units, one after the other."""
    return (np.stack(_nibbles(blocks["q"]), axis=1).reshape(*blocks.shape, _SUPER, 16),)


def _q6_k(blocks: NDArray[np.void]) -> tuple[Bytes, ...]:
    """Two strips are four units: low nibbles of both, then high ones of both."""
    low, high = (half.reshape(-1, 2 * 16) for half in _nibbles(blocks["q"]))
    return np.stack((low, high), axis=1).reshape(*blocks.shape, _SUPER, 16), _pairs(blocks["high"])


_PLANES: dict[str, Callable[[NDArray[np.void]], tuple[Bytes, ...]]] = {
    "q8_0": _q8_0,
    **dict.fromkeys(("q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "iq4_xs"), _as_stored),
    "q2_k": lambda blocks: (_pairs(blocks["q"]),),
    "q3_k": lambda blocks: (_pairs(blocks["q"]), _bits(blocks["high"])),
    "q4_k": _q4_k,
    "q5_k": lambda blocks: (*_q4_k(blocks), _bits(blocks["high"])),
    "q6_k": _q6_k,
}


# --- scales within a block: uint8 [rows, blocks, units] each --------------------------------------


def _by_half(scales: Bytes) -> tuple[Bytes, ...]:
    """A scale for each 16 columns: those of the first halves of units, then those of the second."""
    return scales[:, :, 0::2], scales[:, :, 1::2]


def _q3_k_scales(blocks: NDArray[np.void]) -> tuple[Bytes, ...]:
    """6 bits each, of which 4 are nibbles of the first 8 bytes, and 2 are in the other 4; 32 is subtracted."""
    low, high = blocks["scales"][:, :, :8], blocks["scales"][:, :, 8:]
    scales = np.concatenate((low & 0x0F, low >> 4), axis=-1)
    scales |= np.concatenate([high >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1) << 4
    return _by_half(scales - np.uint8(32))


def _q4_k_scales(blocks: NDArray[np.void]) -> tuple[Bytes, ...]:
    """8 scales and 8 minima of 6 bits, in three words of 4 bytes."""
    first, second, third = (blocks["scales"][:, :, start : start + 4] for start in (0, 4, 8))
    scales = np.concatenate((first & 0x3F, third & 0x0F | first >> 2 & 0x30), axis=-1)
    minima = np.concatenate((second & 0x3F, third >> 4 | second >> 2 & 0x30), axis=-1)
    return scales, minima


def _iq4_xs_scales(blocks: NDArray[np.void]) -> tuple[Bytes, ...]:
    """6 bits each, of which 4 are nibbles, lower first, and 2 are in a word of their own; 32 is subtracted."""
    low, high = blocks["scales"], blocks["scales_high"]
    scales = np.stack((low & 0x0F, low >> 4), axis=-1).reshape(*blocks.shape, _SUPER)
    scales |= np.stack([high >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1).reshape(*blocks.shape, _SUPER) << 4
    return (scales - np.uint8(32),)


_SUB_SCALES: dict[str, Callable[[NDArray[np.void]], tuple[Bytes, ...]]] = {
    "q2_k": lambda blocks: _by_half(blocks["scales"]),
    "q3_k": _q3_k_scales,
    "q4_k": _q4_k_scales,
    "q5_k": _q4_k_scales,
    "q6_k": lambda blocks: _by_half(blocks["scales"]),
    "iq4_xs": _iq4_xs_scales,
}
