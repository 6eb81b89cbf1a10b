"""What the kernel says of memory: which pages are resident or written, and how much this process could still get.

Pages by the PAGEMAP_SCAN ioctl (Linux 6.7) where there is one, else by /proc/self/pagemap; the two give equal answers.
Sources: Documentation/admin-guide/mm/pagemap.rst, cgroup-v1 and cgroup-v2, include/uapi/linux/fs.h, proc(5).
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

_Words = NDArray[np.uint64]
_Flags = NDArray[np.bool_]

PAGEMAP = "/proc/self/pagemap"
PAGE_BYTES = mmap.PAGESIZE

_IS_FILE = 1 << 2
_IS_PRESENT = 1 << 3
_IS_SWAPPED = 1 << 4
_IS_ZERO_PAGE = 1 << 5


@dataclass(frozen=True, slots=True)
class _Categories:
    """Matches pages in none of `absent` and at least one of `any_of`."""

    absent: int
    any_of: int


class PageQuery(Enum):
    """Which pages to look for.

    `WRITTEN`: private pages, in memory or swapped out, that no file backs.
    `RESIDENT`: pages in memory, not counting the shared zero page; their sum is the `Rss` of smaps.
    """

    WRITTEN = _Categories(absent=_IS_FILE, any_of=_IS_PRESENT | _IS_SWAPPED)
    RESIDENT = _Categories(absent=_IS_ZERO_PAGE, any_of=_IS_PRESENT)


class PageScanner(Protocol):
    """Finds pages of this process. Raises OSError when the kernel does."""

    def ranges(self, address: int, nbytes: int, query: PageQuery) -> tuple[tuple[int, int], ...]:
        """(offset from `address`, nbytes) of matching pages, ascending and merged."""
        ...


def merge(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Ascending half-open (start, end) ranges as (start, nbytes), touching neighbours joined."""
    merged: list[list[int]] = []
    for start, end in ranges:
        if merged and merged[-1][1] == start:
            merged[-1][1] = end
        else:
            merged.append([start, end])
    return tuple((start, end - start) for start, end in merged)


class _Region(ctypes.Structure):
    _fields_ = (("start", ctypes.c_uint64), ("end", ctypes.c_uint64), ("categories", ctypes.c_uint64))


class _ScanArguments(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            "size", "flags", "start", "end", "walk_end", "vec", "vec_len",
            "max_pages", "category_inverted", "category_mask", "category_anyof_mask", "return_mask",
        )
    )  # fmt: skip


_READ_WRITE = 3
_PAGEMAP_SCAN = _READ_WRITE << 30 | ctypes.sizeof(_ScanArguments) << 16 | ord("f") << 8 | 16
_REGIONS_PER_CALL = 1024


class IoctlScanner:
    """One ioctl walks page tables at about 3 GiB per millisecond and answers in ranges."""

    def ranges(self, address: int, nbytes: int, query: PageQuery) -> tuple[tuple[int, int], ...]:
        """See `PageScanner`."""
        # A descriptor kept across fork would go on naming the parent's memory, so open it every time.
        fd = os.open(PAGEMAP, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return merge(self._regions(fd, address, address + nbytes, query))
        finally:
            os.close(fd)

    def _regions(self, fd: int, start: int, end: int, query: PageQuery) -> Iterator[tuple[int, int]]:
        base = start
        regions = (_Region * _REGIONS_PER_CALL)()
        while start < end:
            arguments = _ScanArguments(
                size=ctypes.sizeof(_ScanArguments),
                start=start,
                end=end,
                vec=ctypes.addressof(regions),
                vec_len=_REGIONS_PER_CALL,
                category_inverted=query.value.absent,
                category_mask=query.value.absent,
                category_anyof_mask=query.value.any_of,
                return_mask=query.value.any_of,
            )
            count = fcntl.ioctl(fd, _PAGEMAP_SCAN, arguments)
            for region in regions[:count]:
                yield region.start - base, region.end - base
            start = arguments.walk_end


class PagemapScanner:
    """One 64-bit word per page from /proc/self/pagemap: bit 63 present, 62 swapped, 61 file or shared, 56 exclusive."""

    _PAGES_PER_READ = 1 << 16

    def ranges(self, address: int, nbytes: int, query: PageQuery) -> tuple[tuple[int, int], ...]:
        """See `PageScanner`."""
        fd = os.open(PAGEMAP, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return merge(self._regions(fd, address // PAGE_BYTES, nbytes // PAGE_BYTES, query))
        finally:
            os.close(fd)

    def _regions(self, fd: int, first_page: int, num_pages: int, query: PageQuery) -> Iterator[tuple[int, int]]:
        for done in range(0, num_pages, self._PAGES_PER_READ):
            count = min(self._PAGES_PER_READ, num_pages - done)
            words = np.frombuffer(os.pread(fd, 8 * count, 8 * (first_page + done)), np.uint64)
            if len(words) != count:
                raise OSError(f"{PAGEMAP} gave {len(words)} of {count} pages")
            matches = _written(words) if query is PageQuery.WRITTEN else _resident(words, first_page + done)
            edges = np.flatnonzero(np.diff(matches.astype(np.int8), prepend=0, append=0))
            for start, end in edges.reshape(-1, 2) + done:
                yield int(start) * PAGE_BYTES, int(end) * PAGE_BYTES


def _written(words: _Words) -> _Flags:
    return (_is_set(words, 63) | _is_set(words, 62)) & ~_is_set(words, 61)


def _resident(words: _Words, first_page: int) -> _Flags:
    """Pages in memory but the zero pages: the small one is nobody's alone, the huge one says "file" where none is.

    Private memory shared with a forked child looks like the small one and is left out: never more than there is.
    """
    file, exclusive = _is_set(words, 61), _is_set(words, 56)
    return _is_set(words, 63) & np.where(file, ~_without_file(first_page, len(words)), exclusive)


def _without_file(first_page: int, num_pages: int) -> _Flags:
    """Which of the pages lie in mappings of no file."""
    flags = np.zeros(num_pages, np.bool_)
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, _, _, inode = line.split()[:5]
        start, end = (max(0, int(address, 16) // PAGE_BYTES - first_page) for address in addresses.split("-"))
        if inode == "0":
            flags[start:end] = True
    return flags


def _is_set(words: _Words, bit: int) -> _Flags:
    return np.asarray(words & np.uint64(1 << bit) != 0)


def open_page_scanner() -> PageScanner:
    """The quicker scanner that this kernel has, found by asking it about one page."""
    with mmap.mmap(-1, PAGE_BYTES) as probe:
        address = ctypes.addressof(ctypes.c_char.from_buffer(probe))
        try:
            IoctlScanner().ranges(address, PAGE_BYTES, PageQuery.RESIDENT)
        except OSError:
            return PagemapScanner()
    return IoctlScanner()
