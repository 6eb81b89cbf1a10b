"""Whether weights in memory are what they should be: which extents were written, and whether the others are true.

Knows nothing of transitions, nor of what to do where they are not.
"""

from __future__ import annotations

from shuteye.memory.arena import Arena
from shuteye.memory.backings.base import Backing, Source
from shuteye.memory.backings.image import ImageSource
from shuteye.memory.checksums import checksum_hex
from shuteye.memory.layout import MIB, Extent, ExtentRota
from shuteye.memory.weights_state import SourceKind, WeightsState
from shuteye.plans import VerifyMode, VerifyResult

SAMPLE_BYTES = 8 * MIB
"""What `verify("sample")` compares: about a millisecond."""


class Verifier:
    """Looks at the weights of an arena; each call is told where they are."""

    def __init__(self, arena: Arena, backing: Backing) -> None:
        self._arena = arena
        self._backing = backing
        self._rota = ExtentRota(SAMPLE_BYTES)

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
