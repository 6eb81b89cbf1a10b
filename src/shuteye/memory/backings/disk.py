"""Saved extents in an unlinked file of a directory: they take no memory, and vanish with the process.

Knows nothing of extents' contents.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from shuteye.memory.backends.base import MemoryBackend
from shuteye.memory.backings.base import BackingName
from shuteye.memory.backings.spill import SpillBacking
from shuteye.memory.failures import failure_of

_ADVICE = "Changed weights are kept there while asleep: choose a --cache-dir that can be written, or sleep at level 2."


class DiskBacking(SpillBacking):
    """A `Backing` in `directory`, which is made if need be."""

    name: BackingName = "disk"

    def __init__(self, backend: MemoryBackend, directory: Path) -> None:
        super().__init__(backend)
        self._directory = directory

    def __str__(self) -> str:
        return f"the spill directory {self._directory}"

    def free_bytes(self) -> int:
        """See `Backing`. What an unprivileged process may still write to the file system; nothing is made for it."""
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
