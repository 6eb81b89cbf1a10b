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
from shuteye.memory.failures import closing_on_error, failure_of


class DiskBacking(SpillBacking):
    """A `Backing` in `directory`, which is made if need be."""

    name: BackingName = "disk"

    def __init__(self, backend: MemoryBackend, directory: Path) -> None:
        super().__init__(backend)
        self._directory = directory

    def __str__(self) -> str:
        return f"the spill directory {self._directory}"

    def free_bytes(self) -> int:
        """See `SpillBacking`. What an unprivileged process may still write to the file system."""
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            status = os.statvfs(self._directory)
        except OSError as error:
            raise failure_of(f"Reading the free space of {self}", error.errno) from error
        return status.f_bavail * status.f_frsize

    def _create(self, nbytes: int) -> int:
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            fd, path = tempfile.mkstemp(prefix="shuteye-", suffix=".spill", dir=self._directory)
            with closing_on_error(fd):
                Path(path).unlink()
                os.ftruncate(fd, nbytes)
        except OSError as error:
            raise failure_of(f"Making a file in {self}", error.errno) from error
        return fd
