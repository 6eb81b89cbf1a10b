"""Where every tensor of an arena lies: names, shapes, dtypes and kinds in, offsets and extents out. Pure.

Knows nothing of memory, files or PyTorch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import Any

import msgspec

from shuteye.matrices.kinds import ROWS, MatrixKind, kind_of

MIB = 1 << 20
DEFAULT_EXTENT_BYTES = 16 * MIB
SLOT_ALIGNMENT = 64
"""A cache line, and the widest vector register: kernels may load from any slot's start aligned."""

DTYPE_NBYTES: Mapping[str, int] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int16": 2,
    "float16": 2,
    "bfloat16": 2,
    "int32": 4,
    "float32": 4,
    "int64": 8,
    "float64": 8,
}


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not less than `value`."""
    return -(-value // multiple) * multiple


def tensor_nbytes(shape: Iterable[int], dtype: str) -> int:
    """Bytes of a dense tensor."""
    return prod(shape) * DTYPE_NBYTES[dtype]


def _nbytes(shape: tuple[int, ...], dtype: str, kind: str) -> int:
    return tensor_nbytes(shape, dtype) if kind == ROWS.name else kind_of(kind).nbytes(shape, dtype)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that wants a place. Specs of one `group` (say, a decoder layer) share extents.

    Attributes:
        dtype: what is computed with it in.
        kind: how its numbers lie, a name of `matrices/kinds.py`; all but `rows` are for matrices.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    group: str = ""
    kind: str = ROWS.name

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return _nbytes(self.shape, self.dtype, self.kind)


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor's place: bytes [offset, offset + nbytes) of its arena. The rest is as of its `TensorSpec`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    kind: str = ROWS.name

    @property
    def matrix_kind(self) -> MatrixKind:
        """How its numbers lie."""
        return kind_of(self.kind)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return _nbytes(self.shape, self.dtype, self.kind)

    @property
    def end(self) -> int:
        """One past the last byte."""
        return self.offset + self.nbytes


@dataclass(frozen=True, slots=True)
class Extent:
    """A page-aligned slice of an arena: the unit of mapping, backing and checksum."""

    index: int
    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        """One past the last byte."""
        return self.offset + self.nbytes


@dataclass(frozen=True, slots=True)
class Layout:
    """The plan of one arena.

    Invariants, checked on construction: extents tile [0, nbytes) exactly, in order, without gap or overlap, on page
    boundaries; slots follow one another without overlap inside [0, nbytes).

    Raises:
        ValueError: an invariant does not hold.
    """

    slots: Mapping[str, Slot]
    extents: tuple[Extent, ...]
    nbytes: int
    page_bytes: int

    def __post_init__(self) -> None:
        _check_extents(self)
        _check_slots(self)

    def extents_overlapping(self, offset: int, nbytes: int) -> tuple[Extent, ...]:
        """The extents that share at least one byte with [offset, offset + nbytes)."""
        if nbytes <= 0:
            return ()
        first = bisect_right(self.extents, offset, key=lambda extent: extent.end)
        last = bisect_right(self.extents, offset + nbytes - 1, key=lambda extent: extent.offset)
        return self.extents[first:last]

    def to_json(self) -> dict[str, Any]:
        """Builtins only; `from_json` makes an equal layout of them."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Layout:
        """The layout that `to_json` wrote.

        Raises:
            msgspec.ValidationError: (a ValueError) a field is missing, of the wrong type, or breaks an invariant.
        """
        return msgspec.convert(plain, cls)


def _check_extents(layout: Layout) -> None:
    position = 0
    for index, extent in enumerate(layout.extents):
        if (
            extent.index != index
            or extent.offset != position
            or extent.nbytes <= 0
            or extent.nbytes % layout.page_bytes
        ):
            raise ValueError(
                f"extent {index} must be a positive number of whole {layout.page_bytes}-byte pages "
                f"starting at {position}, got {extent}"
            )
        position = extent.end
    if position != layout.nbytes:
        raise ValueError(f"extents end at {position}, the layout at {layout.nbytes}")


def _check_slots(layout: Layout) -> None:
    position = 0
    for name, slot in layout.slots.items():
        if slot.name != name or slot.offset < position or slot.dtype not in DTYPE_NBYTES:
            raise ValueError(f"slot {name!r} must be of a known dtype and start at or after {position}, got {slot}")
        if slot.kind != ROWS.name and len(slot.shape) != 2:
            raise ValueError(f"slot {name!r} is of kind {slot.kind}, which is for matrices, got shape {slot.shape}")
        position = slot.end
    if position > layout.nbytes:
        raise ValueError(f"slots end at {position}, beyond the layout's {layout.nbytes} bytes")


def plan_layout(
    specs: Iterable[TensorSpec],
    *,
    page_bytes: int,
    extent_bytes: int = DEFAULT_EXTENT_BYTES,
    alignment: int = SLOT_ALIGNMENT,
) -> Layout:
    """Give every tensor a place, in the order given.

    Each run of equal `group` starts a new extent; a run longer than `extent_bytes` is cut, at page boundaries, into
    several.
    """
    assert page_bytes % alignment == 0, f"alignment {alignment} must divide the page of {page_bytes} bytes"
    slots: dict[str, Slot] = {}
    extents: list[Extent] = []
    offset = 0
    for _, members in groupby(specs, key=lambda spec: spec.group):
        start = offset
        for spec in members:
            assert spec.name not in slots, f"two tensors are named {spec.name!r}"
            offset = round_up(offset, alignment)
            slots[spec.name] = Slot(spec.name, spec.shape, spec.dtype, offset, spec.kind)
            offset += spec.nbytes
        offset = round_up(offset, page_bytes)
        extents += _cut(start, offset, piece_bytes=round_up(extent_bytes, page_bytes), first_index=len(extents))
    return Layout(slots, tuple(extents), offset, page_bytes)


def _cut(start: int, end: int, *, piece_bytes: int, first_index: int) -> Iterator[Extent]:
    """Extents tiling [start, end), all of `piece_bytes` but the last."""
    for index, offset in enumerate(range(start, end, piece_bytes), start=first_index):
        yield Extent(index, offset, min(piece_bytes, end - offset))


def first_difference(expected: Layout, seen: Layout) -> str | None:
    """The first tensor whose place, shape or dtype differs, described; None if the layouts are equal."""
    for name in (*expected.slots, *seen.slots):
        ours, theirs = expected.slots.get(name), seen.slots.get(name)
        if ours != theirs:
            return f"tensor {name!r} should be {_describe(ours)} and is {_describe(theirs)}"
    return None if expected == seen else "their tensors agree, but are cut into other extents"


def _describe(slot: Slot | None) -> str:
    return f"{slot.dtype} {slot.shape} of kind {slot.kind} at byte {slot.offset:,}" if slot else "absent"


class SampleCursor:
    """Takes a bounded number of bytes of extents at a time, other ones each time, so that every one has its turn."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._next_index = 0

    def take(self, extents: Iterable[Extent]) -> list[Extent]:
        """The next of `extents` in turn: at most `max_bytes` of them, unless one alone is larger."""
        in_turn = sorted(extents, key=lambda extent: (extent.index < self._next_index, extent.index))
        taken: list[Extent] = []
        room = self._max_bytes
        for extent in in_turn:
            if taken and extent.nbytes > room:
                break
            taken.append(extent)
            room -= extent.nbytes
        if taken:
            self._next_index = taken[-1].index + 1
        return taken
