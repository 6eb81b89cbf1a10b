"""The quantized blocks of GGUF files: which bytes of a block are scales, minima and the bits of its weights.

Facts: ggml/src/ggml-common.h (`block_q4_K` and its like) and `gguf.quants`, which is what tests compare with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

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
        u: the unsigned integer of each weight [rows, blocks, units, 32].
        floats: float16 of each block, as the bits they are: scale, and minimum if there is one [rows, blocks] each.
        subs: scales within the blocks, and minima, as the bytes that they have in memory [rows, blocks, units] each.
    """

    u: Bytes
    floats: tuple[NDArray[np.uint16], ...]
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
    return Parts(_INTEGERS[name](typed), floats, () if scales is None else scales(typed))


def _fields(name: str) -> tuple[str, ...]:
    return block_dtype(name).names or ()


# --- the weights: [rows, blocks] of a block → uint8 [rows, blocks, units, 32] -------------------------------------------


def _q8_0(blocks: NDArray[np.void]) -> Bytes:
    return (blocks["q"] ^ 0x80)[:, :, None]


def _halves(blocks: NDArray[np.void]) -> Bytes:
    """Low nibbles are the first 16 columns, high ones the others; a fifth bit apart."""
    q = blocks["q"]
    u = np.empty((*q.shape[:2], 1, UNIT_COLUMNS), np.uint8)
    u[:, :, 0, :16] = q & 0x0F
    u[:, :, 0, 16:] = q >> 4
    if "high" in (blocks.dtype.names or ()):
        u[:, :, 0] |= np.unpackbits(blocks["high"], axis=-1, bitorder="little") << 4
    return u


def _strips(packed: Bytes, bits: int) -> Bytes:
    """Each strip of 32 bytes has one number of `bits` bits for as many units in a row, lowest bits first."""
    strips = packed.reshape(*packed.shape[:2], -1, UNIT_COLUMNS)
    per_strip = 8 // bits
    u = np.empty((*packed.shape[:2], strips.shape[2], per_strip, UNIT_COLUMNS), np.uint8)
    for index in range(per_strip):
        np.right_shift(strips, bits * index, out=u[:, :, :, index])
    u &= (1 << bits) - 1
    return u.reshape(*packed.shape[:2], -1, UNIT_COLUMNS)


def _q2_k(blocks: NDArray[np.void]) -> Bytes:
    return _strips(blocks["q"], 2)


def _q3_k(blocks: NDArray[np.void]) -> Bytes:
    return _strips(blocks["q"], 2) | _strips(blocks["high"], 1) << 2


def _q4_k(blocks: NDArray[np.void]) -> Bytes:
    return _strips(blocks["q"], 4)


def _q5_k(blocks: NDArray[np.void]) -> Bytes:
    return _strips(blocks["q"], 4) | _strips(blocks["high"], 1) << 4


def _q6_k(blocks: NDArray[np.void]) -> Bytes:
    """Strips of 64 bytes: low nibbles of two units, then of the next two."""
    strips = blocks["q"].reshape(*blocks.shape, 2, 1, 2, UNIT_COLUMNS)
    low = np.concatenate((strips & 0x0F, strips >> 4), axis=3).reshape(*blocks.shape, _SUPER, UNIT_COLUMNS)
    return low | _strips(blocks["high"], 2) << 4


def _iq4_xs(blocks: NDArray[np.void]) -> Bytes:
    """As `_halves`, eight times."""
    strips = blocks["q"].reshape(*blocks.shape, _SUPER, 16)
    return np.concatenate((strips & 0x0F, strips >> 4), axis=-1)


_INTEGERS: dict[str, Callable[[NDArray[np.void]], Bytes]] = {
    "q8_0": _q8_0,
    **dict.fromkeys(("q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl"), _halves),
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
    "iq4_xs": _iq4_xs,
}


# --- scales within a block: uint8 [rows, blocks, units] each ------------------------------------------------------------


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
