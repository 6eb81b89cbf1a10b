"""Extents saved in a nameless file at the arena's own offsets, and mapped back from it privately.

Knows nothing of what the file lies on; `disk.py` and `host.py` say that.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence

from shuteye.errors import MemoryExhausted
from shuteye.memory.arena import Arena
from shuteye.memory.backends.base import MemoryBackend
from shuteye.memory.backings.base import BackingName
from shuteye.memory.checksums import checksum_hex
from shuteye.memory.layout import Extent


class SpillBacking(ABC):
    """A sparse file that is made at the first save and gone with `drop`, or with the process.

    Because a saved extent is mapped back privately, the kernel goes on saying which pages were written: one that was
    not is still true here and is never copied again.
    """

    name: BackingName

    def __init__(self, backend: MemoryBackend) -> None:
        self._backend = backend
        self._fd = -1
        self._checksums: dict[int, str] = {}
        self._owned: set[int] = set()  # extents whose blocks the file has, whether or not what is in them is true

    @abstractmethod
    def _create(self, nbytes: int) -> int:
        """The descriptor of a new, nameless, sparse file.

        Raises:
            BackendFailure: it cannot be made.
        """

    @abstractmethod
    def free_bytes(self) -> int:
        """Room for more.

        Raises:
            BackendFailure: it cannot be found out.
        """

    def save(self, arena: Arena, extents: Sequence[Extent]) -> None:
        """See `Backing`. One sync at the end, so that an I/O error is found while the memory still holds the bytes."""
        self.require_room(extents)
        if self._fd < 0:
            self._fd = self._create(arena.nbytes)
        for extent in extents:
            self._checksums.pop(extent.index, None)
        saved: dict[int, str] = {}
        for extent in extents:
            arena.write_file(extent.offset, extent.nbytes, fd=self._fd)
            saved[extent.index] = checksum_hex(arena.bytes_view(extent.offset, extent.nbytes))
        self._backend.sync_file(self._fd)
        self._checksums |= saved
        self._owned.update(saved)

    def growth_bytes(self, extents: Sequence[Extent]) -> int:
        """See `Backing`. A file system that copies on write may yet take more; then the write itself says so."""
        return sum(extent.nbytes for extent in extents if extent.index not in self._owned)

    def require_room(self, extents: Sequence[Extent]) -> None:
        """See `Backing`."""
        needed = self.growth_bytes(extents)
        free = self.free_bytes() if needed else 0
        if needed > free:
            raise MemoryExhausted(
                f"Saving changed weights takes {needed:,} bytes and {self} has {free:,} left. "
                "Free space there, or sleep at level 2."
            )

    def load(self, arena: Arena, offset: int, nbytes: int) -> None:
        """See `Source`."""
        assert self._fd >= 0, f"nothing was saved to {self}"
        arena.map_file(offset, nbytes, fd=self._fd)

    def checksum(self, extent: Extent) -> str | None:
        """See `Source`."""
        return self._checksums.get(extent.index)

    def drop(self) -> None:
        """See `Backing`."""
        self._checksums.clear()
        self._owned.clear()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
