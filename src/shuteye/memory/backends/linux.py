"""Memory of a Linux host: mmap, madvise and the kernel's page accounting."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from pathlib import Path

from shuteye.errors import BackendFailure, MemoryExhausted, ShuteyeError
from shuteye.memory import limits as memory_limits
from shuteye.memory.backends import failure_of
from shuteye.memory.backends.kernel import PageQuery, PageScanner, open_page_scanner
from shuteye.memory.layout import round_up

_PROT_NONE = 0
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value
_MADV_HUGEPAGE = 14
_MADV_POPULATE_READ = 22
"""Linux 5.14."""

_HUGE_PAGE_BYTES = 2 << 20
_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE


def _load_libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.argtypes = (address, size, number, number, number, ctypes.c_int64)
    libc.mmap.restype = address
    libc.munmap.argtypes = (address, size)
    libc.madvise.argtypes = (address, size, number)
    return libc


def _failure(verb: str, address: int, nbytes: int, *, code: int | None) -> BackendFailure | MemoryExhausted:
    return failure_of(f"{verb} of {nbytes:,} bytes at {address:#x}", code)


class LinuxBackend:
    """The `MemoryBackend` of host memory."""

    name = "linux"
    page_bytes = mmap.PAGESIZE

    def __init__(self, *, scanner: PageScanner | None = None) -> None:
        self._libc = _load_libc()
        self._scanner = scanner or open_page_scanner()
        self._can_populate = self._try_populate()

    def _try_populate(self) -> bool:
        """Ask with one page: later, the errno of a kernel that cannot is also that of a range that is not mapped."""
        with mmap.mmap(-1, self.page_bytes) as page:
            address = ctypes.addressof(ctypes.c_char.from_buffer(page))
            return self._advise(address, self.page_bytes, _MADV_POPULATE_READ) == 0

    def reserve(self, nbytes: int) -> int:
        """See `MemoryBackend`. Reserves a huge page more than asked for, and trims both ends to alignment."""
        total = nbytes + _HUGE_PAGE_BYTES
        start = self._map("reserve", 0, total, protection=_PROT_NONE, flags=_ANONYMOUS)
        address = round_up(start, _HUGE_PAGE_BYTES)
        try:
            self.unreserve(start, address - start)
            self.unreserve(address + nbytes, start + total - (address + nbytes))
        except ShuteyeError:
            self._libc.munmap(start, total)
            raise
        return address

    def unreserve(self, address: int, nbytes: int) -> None:
        """See `MemoryBackend`."""
        if nbytes and self._libc.munmap(address, nbytes):
            raise _failure("unreserve", address, nbytes, code=ctypes.get_errno())

    def commit(self, address: int, nbytes: int) -> None:
        """See `MemoryBackend`. Linux promises more than it has, so what it has is asked first."""
        available = self.available_bytes()
        if nbytes > available:
            raise MemoryExhausted(
                f"{nbytes:,} bytes are needed and {available:,} are available. "
                f"Free memory, or ask for less (a smaller --kv-cache-memory)."
            )
        self._map("commit", address, nbytes, protection=_READ_WRITE, flags=_ANONYMOUS | _MAP_FIXED)
        code = self._advise(address, nbytes, _MADV_HUGEPAGE)
        if code not in (0, errno.EINVAL):  # EINVAL: a kernel built without huge pages
            raise _failure("commit", address, nbytes, code=code)

    def map_file(self, address: int, nbytes: int, *, fd: int, offset: int) -> None:
        """See `MemoryBackend`."""
        flags = mmap.MAP_PRIVATE | _MAP_NORESERVE | _MAP_FIXED
        self._map("map_file", address, nbytes, protection=_READ_WRITE, flags=flags, fd=fd, offset=offset)

    def populate(self, address: int, nbytes: int) -> None:
        """See `MemoryBackend`."""
        if not self._can_populate:
            self._touch(address, nbytes)
            return
        code = self._advise(address, nbytes, _MADV_POPULATE_READ)
        if code:
            raise _failure("populate", address, nbytes, code=code)

    def _touch(self, address: int, nbytes: int) -> None:
        """For kernels without MADV_POPULATE_READ: read one byte of every page."""
        bytes(memoryview((ctypes.c_ubyte * nbytes).from_address(address))[:: self.page_bytes])

    def release(self, address: int, nbytes: int) -> None:
        """See `MemoryBackend`. One mmap over the range: an access crashes instead of reading zeros."""
        self._map("release", address, nbytes, protection=_PROT_NONE, flags=_ANONYMOUS | _MAP_FIXED)

    def written_ranges(self, address: int, nbytes: int) -> tuple[tuple[int, int], ...]:
        """See `MemoryBackend`."""
        return self._scan("written_ranges", address, nbytes, PageQuery.WRITTEN)

    def resident_bytes(self, address: int, nbytes: int) -> int:
        """See `MemoryBackend`. Equals the `Rss` of smaps for the range."""
        return sum(size for _, size in self._scan("resident_bytes", address, nbytes, PageQuery.RESIDENT))

    def available_bytes(self) -> int:
        """See `MemoryBackend`."""
        try:
            return memory_limits.available_bytes()
        except OSError as error:
            raise BackendFailure(f"Reading the memory limits failed: {error}.") from error

    def process_resident_bytes(self) -> int:
        """See `MemoryBackend`. `Rss` of /proc/self/smaps_rollup."""
        try:
            return memory_limits.read_fields(Path("/proc/self/smaps_rollup"), unit_bytes=1024)["Rss"]
        except (OSError, KeyError) as error:
            raise BackendFailure(f"Reading /proc/self/smaps_rollup failed: {error}.") from error

    def write_file(self, address: int, nbytes: int, *, fd: int, offset: int) -> None:
        """See `MemoryBackend`."""
        rest = memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B")
        try:
            while rest:
                written = os.pwrite(fd, rest, offset)
                rest, offset = rest[written:], offset + written
        except OSError as error:
            raise _failure("write_file", address, nbytes, code=error.errno) from error

    def sync_file(self, fd: int) -> None:
        """See `MemoryBackend`."""
        try:
            os.fdatasync(fd)
        except OSError as error:
            raise failure_of(f"sync_file of descriptor {fd}", error.errno) from error

    def _map(
        self, verb: str, address: int, nbytes: int, *, protection: int, flags: int, fd: int = -1, offset: int = 0
    ) -> int:
        mapped: int = self._libc.mmap(address, nbytes, protection, flags, fd, offset)
        if mapped == _MAP_FAILED:
            raise _failure(verb, address, nbytes, code=ctypes.get_errno())
        return mapped

    def _advise(self, address: int, nbytes: int, advice: int) -> int:
        """0, or the errno."""
        return ctypes.get_errno() if self._libc.madvise(address, nbytes, advice) else 0

    def _scan(self, verb: str, address: int, nbytes: int, query: PageQuery) -> tuple[tuple[int, int], ...]:
        try:
            return self._scanner.ranges(address, nbytes, query)
        except OSError as error:
            raise _failure(verb, address, nbytes, code=error.errno) from error
