"""The weight image as the source of every extent that was never written: there is nothing to save.

Knows nothing of how the image was made or locked.
"""

from __future__ import annotations

from shuteye.memory.arena import Arena
from shuteye.memory.backings.base import BackingName
from shuteye.memory.image import WeightImage
from shuteye.memory.layout import Extent


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
