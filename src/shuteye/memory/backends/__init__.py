"""The seam between arenas and whoever owns physical memory: a few verbs on (address, nbytes), and errors that are ours.

Knows nothing of tensors, extents or tags.
"""

from __future__ import annotations

import errno
import os
from typing import Protocol

from shuteye.config import MemoryBackendName
from shuteye.errors import BackendFailure, InvalidRequest, MemoryExhausted


class MemoryBackend(Protocol):
    """Reserves addresses and moves physical memory in and out under them.

    Addresses and sizes are whole pages unless said otherwise. Every verb raises `BackendFailure`, or `MemoryExhausted`
    where the system will not give the bytes; after a failed verb the pages of its range are in an unknown state.

    Attributes:
        name: what `--memory-backend` calls it.
        page_bytes: granularity of every range.
    """

    name: str
    page_bytes: int

    def reserve(self, nbytes: int) -> int:
        """An address range backed by nothing, aligned for huge pages; touching it crashes."""
        ...

    def unreserve(self, address: int, nbytes: int) -> None:
        """Give back the addresses and whatever is mapped there. Nothing may point there any more."""
        ...

    def commit(self, address: int, nbytes: int) -> None:
        """Readable, writable memory, physical only once touched; huge pages where the system has them.

        Raises:
            MemoryExhausted: more than `available_bytes`.
        """
        ...

    def map_file(self, address: int, nbytes: int, *, fd: int, offset: int) -> None:
        """A private, writable view of a file: its pages are shared until written, and writes never reach the file."""
        ...

    def populate(self, address: int, nbytes: int) -> None:
        """Bring every page in now, so that no later access waits for or fails on I/O."""
        ...

    def release(self, address: int, nbytes: int) -> None:
        """Give the physical memory back and keep the addresses; a later access crashes. Idempotent."""
        ...

    def written_ranges(self, address: int, nbytes: int) -> tuple[tuple[int, int], ...]:
        """(offset, nbytes) of the pages that no longer belong to the mapped file, ascending and merged.

        In memory without a file that is every page ever touched.
        """
        ...

    def resident_bytes(self, address: int, nbytes: int) -> int:
        """Physical memory under the range, as the system accounts it."""
        ...

    def available_bytes(self) -> int:
        """Physical memory the system could still give."""
        ...

    def process_resident_bytes(self) -> int:
        """Physical memory of the whole process, as the system accounts it."""
        ...

    def write_file(self, address: int, nbytes: int, *, fd: int, offset: int) -> None:
        """Write the range to a file, wholly."""
        ...

    def sync_file(self, fd: int) -> None:
        """Return once the file's data is on its device; an I/O error surfaces here."""
        ...


def open_backend(name: MemoryBackendName) -> MemoryBackend:
    """The backend called `name`; `auto` is the host's memory.

    Raises:
        InvalidRequest: the backend is unknown, or not built yet.
    """
    if name in ("auto", "linux"):
        from shuteye.memory.backends.linux import LinuxBackend

        return LinuxBackend()
    if name == "fake":
        from shuteye.memory.backends.fake import FakeBackend

        return FakeBackend()
    if name == "cuda":
        raise InvalidRequest("memory_backend 'cuda' is not built yet: use 'auto' or 'linux'.", param="memory_backend")
    raise InvalidRequest(f"memory_backend must be auto, linux, fake or cuda, got {name!r}.", param="memory_backend")


_NO_ROOM = frozenset({errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def failure_of(what: str, code: int | None, *, advice: str = "") -> BackendFailure | MemoryExhausted:
    """The error to raise when `what` failed with errno `code`: exhaustion if there was no room, else a failure."""
    kind = MemoryExhausted if code in _NO_ROOM else BackendFailure
    return kind(f"{what} failed: {os.strerror(code or 0)} (errno {code}). {advice}".rstrip())
