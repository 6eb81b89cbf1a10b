"""The seams of a backing: what extents are brought back from, and what they are saved to; the image is such a source.

Knows nothing of transitions; `residency.py` decides what is saved and when.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from shuteye.memory.arena import Arena
from shuteye.memory.image import WeightImage
from shuteye.memory.layout import Extent

BackingName = Literal["image", "disk", "host"]


class Source(Protocol):
    """Holds true copies of extents, at the arena's own offsets."""

    @property
    def name(self) -> BackingName:
        """What reports call it."""
        ...

    def load(self, arena: Arena, offset: int, nbytes: int) -> None:
        """Put bytes [offset, offset + nbytes) back under the arena; populated later, privately writable.

        Raises:
            BackendFailure: the kernel refused.
        """
        ...

    def checksum(self, extent: Extent) -> str | None:
        """What the extent's bytes hash to, or None if no true copy is held."""
        ...


class Backing(Source, Protocol):
    """A source that extents can be saved to."""

    def growth_bytes(self, extents: Sequence[Extent]) -> int:
        """New room that saving `extents` takes; what was saved before is overwritten where it is."""
        ...

    def require_room(self, extents: Sequence[Extent]) -> None:
        """Refuse what `save` could not write for want of room.

        Raises:
            MemoryExhausted: no room.
            BackendFailure: it cannot be found out.
        """
        ...

    def save(self, arena: Arena, extents: Sequence[Extent]) -> None:
        """Copy extents, replacing older copies, and return once they are safe.

        On error the arena is untouched and no copy is held of `extents`; those of other extents stay true.

        Raises:
            MemoryExhausted: no room.
            BackendFailure: writing failed.
        """
        ...

    def drop(self) -> None:
        """Forget every copy and give back the room. Nothing may be mapped from here. Idempotent."""
        ...


class ImageSource:
    """The extents of an open image."""

    name: BackingName = "image"

    def __init__(self, image: WeightImage) -> None:
        self._image = image

    def load(self, arena: Arena, offset: int, nbytes: int) -> None:
        """See `Source`."""
        arena.map_file(offset, nbytes, fd=self._image.fd)

    def checksum(self, extent: Extent) -> str:
        """See `Source`."""
        return self._image.checksums[extent.index]
