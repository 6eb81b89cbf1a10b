"""Where changed weights are kept during sleep: a nameless file at the arena's own offsets, on disk or in host memory.

On disk it takes no memory, and vanishes with the process. In host memory, for devices whose memory is another or where
no disk may be written, it gives back none on the CPU.
"""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from shuteye.errors import MemoryExhausted
from shuteye.file_locks import closing_on_error
from shuteye.memory.arena import Arena
from shuteye.memory.backends import MemoryBackend, failure_of
from shuteye.memory.image_files import checksum_hex
from shuteye.memory.layout import Extent

BackingName = Literal["image", "disk", "host"]


class Backing(ABC):
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
        """Copy extents, replacing older copies, and return once they are safe.

        On error the arena is untouched and no copy is held of `extents`; those of other extents stay true. One sync at
        the end, so that an I/O error is found while the memory still holds the bytes.

        Raises:
            MemoryExhausted: no room.
            BackendFailure: writing failed.
        """
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
        """New room that saving `extents` takes; what was saved before is overwritten where it is.

        A file system that copies on write may yet take more; then the write itself says so.
        """
        return sum(extent.nbytes for extent in extents if extent.index not in self._owned)

    def require_room(self, extents: Sequence[Extent]) -> None:
        """Refuse what `save` could not write for want of room.

        Raises:
            MemoryExhausted: no room.
            BackendFailure: it cannot be found out.
        """
        needed = self.growth_bytes(extents)
        free = self.free_bytes() if needed else 0
        if needed > free:
            raise MemoryExhausted(
                f"Saving changed weights takes {needed:,} bytes and {self} has {free:,} left. "
                "Free space there, or sleep at level 2."
            )

    def load(self, arena: Arena, offset: int, nbytes: int) -> None:
        """Put bytes [offset, offset + nbytes) back under the arena; populated later, privately writable.

        Raises:
            BackendFailure: the kernel refused.
        """
        assert self._fd >= 0, f"nothing was saved to {self}"
        arena.map_file(offset, nbytes, fd=self._fd)

    def checksum(self, extent: Extent) -> str | None:
        """What the extent's bytes hash to, or None if no true copy is held."""
        return self._checksums.get(extent.index)

    def drop(self) -> None:
        """Forget every copy and give back the room. Nothing may be mapped from here. Idempotent."""
        self._checksums.clear()
        self._owned.clear()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


_ADVICE = "Changed weights are kept there while asleep: choose a --cache-dir that can be written, or sleep at level 2."


class DiskBacking(Backing):
    """A `Backing` in `directory`, which is made if need be."""

    name: BackingName = "disk"

    def __init__(self, backend: MemoryBackend, directory: Path) -> None:
        super().__init__(backend)
        self._directory = directory

    def __str__(self) -> str:
        return f"the spill directory {self._directory}"

    def free_bytes(self) -> int:
        """What an unprivileged process may still write to the file system; nothing is made for it."""
        try:
            status = os.statvfs(next(path for path in (self._directory, *self._directory.parents) if path.exists()))
        except OSError as error:
            raise failure_of(f"Reading the free space of {self}", error.errno, advice=_ADVICE) from error
        return status.f_bavail * status.f_frsize

    def _create(self, nbytes: int) -> int:
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(prefix="shuteye-", suffix=".spill", dir=self._directory) as file:
                os.ftruncate(file.fileno(), nbytes)
                fd = os.dup(file.fileno())
        except OSError as error:
            raise failure_of(f"Making a file in {self}", error.errno, advice=_ADVICE) from error
        return fd


class HostBacking(Backing):
    """A `Backing` in a memory file, which counts as memory of its own and is mapped back without a copy."""

    name: BackingName = "host"

    def __str__(self) -> str:
        return "host memory"

    def free_bytes(self) -> int:
        """What the system could still give."""
        return self._backend.available_bytes()

    def _create(self, nbytes: int) -> int:
        try:
            fd = os.memfd_create("shuteye-spill", os.MFD_CLOEXEC)
            with closing_on_error(fd):
                os.ftruncate(fd, nbytes)
        except OSError as error:
            raise failure_of(f"Making a file in {self}", error.errno) from error
        return fd
