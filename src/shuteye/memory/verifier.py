"""Whether weights in memory are what they should be, and whether the image under them is still theirs.

Knows nothing of transitions, nor of what to do where they are not.
"""

from __future__ import annotations

from shuteye.errors import ImageFailure
from shuteye.memory.arena import Arena
from shuteye.memory.backings.base import Backing, ImageSource, Source
from shuteye.memory.image_files import checksum_hex
from shuteye.memory.layout import MIB, Extent, SampleCursor
from shuteye.memory.weights import SourceKind, WeightsState
from shuteye.state import VerifyMode, VerifyResult

SAMPLE_BYTES = 8 * MIB
"""What `verify("sample")` compares: about a millisecond."""


class Verifier:
    """Looks at the weights of an arena; each call is told where they are."""

    def __init__(self, arena: Arena, backing: Backing) -> None:
        self._arena = arena
        self._backing = backing
        self._rota = SampleCursor(SAMPLE_BYTES)

    def source(self, state: WeightsState, kind: SourceKind) -> Source:
        """What brings back extents of a kind."""
        return self._backing if kind == "saved" else ImageSource(state.image)

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
        chosen = self._rota.take(clean) if mode == "sample" else clean
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

    def mapped_anew(self) -> None:
        """Whatever was mapped before is gone, and with it what was wrong with it."""
        self._written_bytes, self._spoilt = 0, None

    def note_written(self) -> None:
        """An update has ended: what lies over the image now is to stay there.

        Raises:
            BackendFailure: the kernel would not say which pages were written.
        """
        self._written_bytes = self._count_written()

    def require_intact(self, state: WeightsState) -> None:
        """Refuse to go on with weights under which the image's file was changed, until they are mapped anew.

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
