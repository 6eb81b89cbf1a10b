"""Saved extents in host memory: for devices whose memory is not the host's, or where no disk may be written.

Knows nothing of extents' contents. On the CPU this gives back no memory for the extents it holds.
"""

from __future__ import annotations

import os

from shuteye.memory.backings.base import BackingName
from shuteye.memory.backings.spill import SpillBacking
from shuteye.memory.failures import closing_on_error, failure_of


class HostBacking(SpillBacking):
    """A `Backing` in a memory file, which counts as memory of its own and is mapped back without a copy."""

    name: BackingName = "host"

    def __str__(self) -> str:
        return "host memory"

    def free_bytes(self) -> int:
        """See `SpillBacking`."""
        return self._backend.available_bytes()

    def _create(self, nbytes: int) -> int:
        try:
            fd = os.memfd_create("shuteye-spill", os.MFD_CLOEXEC)
            with closing_on_error(fd):
                os.ftruncate(fd, nbytes)
        except OSError as error:
            raise failure_of(f"Making a file in {self}", error.errno) from error
        return fd
