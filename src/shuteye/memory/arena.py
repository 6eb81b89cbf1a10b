"""An arena: one address-stable range of memory, and views that look into it. No torch."""

from __future__ import annotations

import ctypes
import weakref

from shuteye.memory.backends import MemoryBackend
from shuteye.memory.layout import round_up
from shuteye.state import Tag


def _bytes_at(address: int, nbytes: int) -> ctypes.Array[ctypes.c_ubyte]:
    """Memory at an address as a buffer; of a subclass, because only those take weak references."""
    array_type = ctypes.c_ubyte * nbytes
    held_type = type("ArenaBytes", (array_type,), {})
    assert issubclass(held_type, array_type)
    return held_type.from_address(address)


class Arena:
    """Bytes [0, nbytes) at a fixed address; views stay valid while the memory under them comes and goes.

    The addresses are given back once the arena is closed and its last view is gone, so that a view left behind crashes
    on access instead of reading whatever was mapped there next.
    """

    def __init__(self, backend: MemoryBackend, *, tag: Tag, address: int, nbytes: int) -> None:
        self.tag = tag
        self.address = address
        self.nbytes = nbytes
        self.closed = False
        self._backend = backend
        self._bytes = _bytes_at(address, nbytes)  # every view keeps this object alive
        if nbytes:
            weakref.finalize(self._bytes, backend.unreserve, address, nbytes).atexit = False

    @classmethod
    def reserve(cls, backend: MemoryBackend, *, tag: Tag, nbytes: int) -> Arena:
        """Addresses for `nbytes`, rounded up to whole pages, and no memory yet.

        An arena of no bytes is the KV cache of a model that has none: a tag that sleeps and wakes as others do.

        Raises:
            MemoryExhausted: the address space has no such gap.
        """
        assert nbytes >= 0, f"an arena cannot have {nbytes} bytes"
        if nbytes == 0:
            return cls(backend, tag=tag, address=0, nbytes=0)
        nbytes = round_up(nbytes, backend.page_bytes)
        return cls(backend, tag=tag, address=backend.reserve(nbytes), nbytes=nbytes)

    def bytes_view(self, offset: int, nbytes: int) -> memoryview:
        """Bytes [offset, offset + nbytes), writable. It owns nothing, and keeps only the addresses alive."""
        self._require_inside(offset, nbytes)
        return memoryview(self._bytes).cast("B")[offset : offset + nbytes]

    def _require_inside(self, offset: int, nbytes: int) -> None:
        assert not self.closed, f"the {self.tag} arena is closed"
        assert 0 <= offset <= offset + nbytes <= self.nbytes, (
            f"[{offset}, {offset + nbytes}) is not inside the {self.tag} arena's {self.nbytes} bytes"
        )

    def commit(self) -> None:
        """Fresh memory under the whole arena, physical once touched.

        Raises:
            MemoryExhausted: the system does not have it.
            BackendFailure: the kernel refused.
        """
        if self.nbytes:
            self._backend.commit(self.address, self.nbytes)

    def map_file(self, offset: int, nbytes: int, *, fd: int) -> None:
        """Bytes [offset, offset + nbytes) of a file, privately, at the same offset of the arena.

        Raises:
            BackendFailure: the kernel refused.
        """
        self._require_inside(offset, nbytes)
        self._backend.map_file(self.address + offset, nbytes, fd=fd, offset=offset)

    def populate(self) -> None:
        """Bring every page in now.

        Raises:
            BackendFailure: reading the mapped file failed.
        """
        if self.nbytes:
            self._backend.populate(self.address, self.nbytes)

    def write_file(self, offset: int, nbytes: int, *, fd: int) -> None:
        """Write bytes [offset, offset + nbytes) to the same offset of a file.

        Raises:
            BackendFailure: the write failed.
            MemoryExhausted: the file system is full.
        """
        self._require_inside(offset, nbytes)
        self._backend.write_file(self.address + offset, nbytes, fd=fd, offset=offset)

    def written_ranges(self) -> tuple[tuple[int, int], ...]:
        """(offset, nbytes) of pages that differ from the file mapped there.

        Raises:
            BackendFailure: the kernel would not say.
        """
        return self._backend.written_ranges(self.address, self.nbytes)

    def release(self) -> None:
        """Give the physical memory back; views keep their addresses and crash when touched. Idempotent.

        Raises:
            BackendFailure: the kernel refused.
        """
        if self.nbytes:
            self._backend.release(self.address, self.nbytes)

    def resident_bytes(self) -> int:
        """Physical memory under the arena, by the kernel's account.

        Raises:
            BackendFailure: the kernel would not say.
        """
        return self._backend.resident_bytes(self.address, self.nbytes) if self.nbytes else 0

    def close(self) -> None:
        """Release for good. Idempotent.

        Raises:
            BackendFailure: the kernel refused.
        """
        if not self.closed:
            self.release()
            self.closed = True
            del self._bytes
