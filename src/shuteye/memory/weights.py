"""Where the weights are, what would bring each extent back, and whether they are still what they should be.

Moves between such states are pure data; `residency.py` carries them out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from shuteye.errors import ImageFailure, TransitionConflict
from shuteye.memory.arena import Arena
from shuteye.memory.backings import Backing
from shuteye.memory.image import WeightImage
from shuteye.memory.image_files import checksum_hex
from shuteye.memory.layout import MIB, Extent, SampleCursor
from shuteye.state import TagResidency, VerifyMode, VerifyResult

SourceKind = Literal["image", "saved", "memory"]
"""Of one extent: the image's bytes; a copy in the backing; or memory alone, because no file is mapped there."""

Move = Literal["keep", "offload", "discard", "restore", "reload", "blank"]

_ALLOWED_FROM: Mapping[Move, frozenset[TagResidency]] = {
    "keep": frozenset({"resident", "offloaded", "discarded", "blank"}),
    "offload": frozenset({"resident", "offloaded"}),
    "discard": frozenset({"resident", "offloaded", "discarded", "blank"}),
    "restore": frozenset({"offloaded", "resident"}),
    "reload": frozenset({"resident", "offloaded", "discarded", "blank"}),
    "blank": frozenset({"offloaded", "discarded", "blank"}),
}


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring extents of one source: bytes [offset, offset + nbytes), mapped by one call."""

    kind: SourceKind
    offset: int
    nbytes: int


def _all_extents(image: WeightImage, kind: SourceKind) -> tuple[SourceKind, ...]:
    return (kind,) * len(image.layout.extents)


@dataclass(frozen=True, slots=True)
class WeightsState:
    """One rank's weights.

    `sources` has one entry per extent. While the weights are mapped it is what lies under them, and pages written since
    differ from it; while they are offloaded it is what will bring them back; discarded, it means nothing.
    """

    residency: TagResidency
    image: WeightImage
    sources: tuple[SourceKind, ...]

    @classmethod
    def initial(cls, image: WeightImage) -> WeightsState:
        """Nothing mapped yet: the image will bring back every extent."""
        return cls("offloaded", image, _all_extents(image, "image"))

    @property
    def is_mapped(self) -> bool:
        """Whether the arena's addresses may be touched."""
        return self.residency in ("resident", "blank")

    def require(self, move: Move) -> None:
        """Refuse an illegal move.

        Raises:
            TransitionConflict: the weights are not where the move starts.
        """
        if self.residency not in _ALLOWED_FROM[move]:
            raise TransitionConflict(
                f"Weights that are {self.residency} cannot be moved by {move!r}; "
                f"they must be {' or '.join(sorted(_ALLOWED_FROM[move]))}."
            )

    def offloaded(self, saved: Set[int]) -> WeightsState:
        """Brought back by the backing where an extent's index is in `saved`, else from where it was mapped."""
        sources: tuple[SourceKind, ...] = tuple(
            "saved" if index in saved else kind for index, kind in enumerate(self.sources)
        )
        assert "memory" not in sources, "an extent that no file holds must be saved before it can be offloaded"
        return replace(self, residency="offloaded", sources=sources)

    def after_wake(self, move: Move, next_image: WeightImage) -> WeightsState | None:
        """The state that a move of a `WakePlan` leads to, or None if the weights are left alone.

        Raises:
            TransitionConflict: the weights are not where the move starts.
        """
        if move == "keep":
            return None
        self.require(move)
        if move == "reload":
            return self.reloaded(next_image)
        if self.is_mapped:
            return None
        return self.restored() if move == "restore" else self.blank()

    def discarded(self) -> WeightsState:
        """Nothing brings them back but a reload."""
        return replace(self, residency="discarded")

    def restored(self) -> WeightsState:
        """In memory, each extent from its source."""
        return replace(self, residency="resident")

    def reloaded(self, image: WeightImage) -> WeightsState:
        """In memory, every extent from `image`."""
        return WeightsState("resident", image, _all_extents(image, "image"))

    def blank(self) -> WeightsState:
        """Mapped, and not yet written."""
        return replace(self, residency="blank", sources=_all_extents(self.image, "memory"))

    def runs(self) -> Iterator[Run]:
        """The arena in as few pieces as there are changes of source."""
        pairs = zip(self.sources, self.image.layout.extents, strict=True)
        for kind, group in groupby(pairs, key=lambda pair: pair[0]):
            extents = [extent for _, extent in group]
            yield Run(kind, extents[0].offset, extents[-1].end - extents[0].offset)


# --- whether they are true ------------------------------------------------------------------------

SAMPLE_BYTES = 8 * MIB
"""What `verify("sample")` compares: about a millisecond."""


class Verifier:
    """Looks at the weights of an arena; each call is told where they are."""

    def __init__(self, arena: Arena, backing: Backing) -> None:
        self._arena = arena
        self._backing = backing
        self._cursor = SampleCursor(SAMPLE_BYTES)

    def source(self, state: WeightsState, kind: SourceKind) -> Backing | WeightImage:
        """What brings back extents of a kind."""
        return self._backing if kind == "saved" else state.image

    def dirty(self, state: WeightsState) -> tuple[Extent, ...]:
        """The extents in memory that differ from what they were mapped from, or were mapped from nothing.

        Raises:
            BackendFailure: the kernel would not say which pages were written.
        """
        if not state.is_mapped:
            return ()
        layout = state.image.layout
        dirty = {index for index, kind in enumerate(state.sources) if kind == "memory"}
        for offset, nbytes in self._arena.written_ranges():
            dirty.update(extent.index for extent in layout.extents_overlapping(offset, nbytes))
        return tuple(layout.extents[index] for index in sorted(dirty))

    def verify(self, state: WeightsState, mode: VerifyMode) -> VerifyResult:
        """See `Residency.verify`."""
        if mode == "off" or state.residency != "resident":
            return VerifyResult(0)
        dirty = set(self.dirty(state))
        clean = [extent for extent in state.image.layout.extents if extent not in dirty]
        chosen = self._cursor.take(clean) if mode == "sample" else clean
        bad = tuple(extent.index for extent in chosen if not self._is_true(state, extent))
        return VerifyResult(sum(extent.nbytes for extent in chosen), bad)

    def is_held(self, extent: Extent) -> bool:
        """Whether the backing has what is in memory."""
        return self._backing.checksum(extent) == self._checksum_in_memory(extent)

    def _is_true(self, state: WeightsState, extent: Extent) -> bool:
        return self.source(state, state.sources[extent.index]).checksum(extent) == self._checksum_in_memory(extent)

    def _checksum_in_memory(self, extent: Extent) -> str:
        return checksum_hex(self._arena.bytes_view(extent.offset, extent.nbytes))


class ImageWatch:
    """Over the weights of an arena, from one mapping of them to the next.

    A file that is cut short takes along the pages written over it, even if it is as it was a moment later (`cp` of the
    very same bytes begins so). So how much was written is remembered, and what was found wrong once stays wrong.
    """

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._written_bytes = 0
        self._spoilt: str | None = None

    def remapped(self) -> None:
        """Whatever was mapped before is gone, and with it what was wrong with it."""
        self._written_bytes, self._spoilt = 0, None

    def note_written(self) -> None:
        """An update has ended: what lies over the image now is to stay there.

        Raises:
            BackendFailure: the kernel would not say which pages were written.
        """
        self._written_bytes = self._count_written()

    def require_intact(self, state: WeightsState) -> None:
        """Refuse to go on with weights under which the image's file was changed, until they are mapped again.

        Raises:
            ImageFailure: see `WeightImage.require_intact`; or updates are lost.
            BackendFailure: the kernel would not say which pages were written.
        """
        if not state.is_mapped or "image" not in state.sources:
            return
        if self._spoilt is None:
            self._spoilt = self._find_damage(state)
        if self._spoilt is not None:
            raise ImageFailure(self._spoilt)

    def is_intact(self, state: WeightsState) -> bool:
        """Whether `require_intact` would let it pass."""
        try:
            self.require_intact(state)
        except ImageFailure:
            return False
        return True

    def _find_damage(self, state: WeightsState) -> str | None:
        try:
            touched = state.image.require_intact()
        except ImageFailure as failure:
            return failure.message
        if touched and self._count_written() < self._written_bytes:
            return (
                f"The weight image {state.image.path} was cut short while in use. It is as it was, but updates written "
                "over it are lost. Wake up to serve the image, and update the weights again."
            )
        return None

    def _count_written(self) -> int:
        return sum(nbytes for _, nbytes in self._arena.written_ranges())
