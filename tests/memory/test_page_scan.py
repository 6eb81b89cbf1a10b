"""Page accounting: both scanners, against each other and against smaps."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from memory_harness import PAGE

from shuteye.memory.arena import Arena
from shuteye.memory.backends.kernel import IoctlScanner, PagemapScanner, PageQuery, merge, open_page_scanner
from shuteye.memory.backends.linux import LinuxBackend

NUM_PAGES = 700


def has_ioctl() -> bool:
    return isinstance(open_page_scanner(), IoctlScanner)


SCANNERS = [
    pytest.param(IoctlScanner(), id="ioctl", marks=pytest.mark.skipif(not has_ioctl(), reason="Linux before 6.7")),
    pytest.param(PagemapScanner(), id="pagemap"),
]


def smaps_rss(address: int, nbytes: int) -> int:
    """The sum of `Rss` over the mappings inside [address, address + nbytes)."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        header = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if header:
            start, end = (int(group, 16) for group in header.groups())
            inside = address <= start and end <= address + nbytes
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.fixture
def arena() -> Iterator[Arena]:
    """With a reserved neighbour on each side, so that its mappings cannot merge with another's."""
    arena = Arena.reserve(LinuxBackend(), tag="weights", nbytes=NUM_PAGES * PAGE)
    yield arena
    arena.close()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "file"
    path.write_bytes(random.Random(0).randbytes(NUM_PAGES * PAGE))
    with path.open("rb") as opened:
        yield opened.fileno()


@pytest.mark.parametrize("scanner", SCANNERS)
def test_resident_is_the_rss_of_smaps_for_a_file_a_change_and_a_hole(scanner, arena: Arena, file: int) -> None:
    def resident() -> int:
        return sum(size for _, size in scanner.ranges(arena.address, arena.nbytes, PageQuery.RESIDENT))

    assert resident() == smaps_rss(arena.address, arena.nbytes) == 0
    arena.map_file(0, arena.nbytes, fd=file)
    arena.populate()
    assert resident() == smaps_rss(arena.address, arena.nbytes) == arena.nbytes
    arena.bytes_view(5 * PAGE, 1)[0] = 1
    assert resident() == smaps_rss(arena.address, arena.nbytes) > 0
    arena.release()
    assert resident() == smaps_rss(arena.address, arena.nbytes) == 0


@pytest.mark.parametrize("scanner", SCANNERS)
def test_the_shared_zero_page_does_not_count_as_resident(scanner, arena: Arena) -> None:
    arena.commit()
    assert sum(arena.bytes_view(0, 20 * PAGE)) == 0
    assert scanner.ranges(arena.address, arena.nbytes, PageQuery.RESIDENT) == ()
    assert smaps_rss(arena.address, arena.nbytes) == 0


@pytest.mark.parametrize("scanner", SCANNERS)
def test_written_is_exactly_what_was_written(scanner, arena: Arena, file: int) -> None:
    arena.map_file(0, arena.nbytes, fd=file)
    assert scanner.ranges(arena.address, arena.nbytes, PageQuery.WRITTEN) == ()
    arena.populate()
    assert scanner.ranges(arena.address, arena.nbytes, PageQuery.WRITTEN) == ()
    for offset in (PAGE - 1, PAGE, 10 * PAGE, (NUM_PAGES - 1) * PAGE):
        arena.bytes_view(offset, 1)[0] = 1
    expected = ((0, 2 * PAGE), (10 * PAGE, PAGE), ((NUM_PAGES - 1) * PAGE, PAGE))
    assert scanner.ranges(arena.address, arena.nbytes, PageQuery.WRITTEN) == expected


@pytest.mark.parametrize("query", list(PageQuery))
def test_both_scanners_agree_on_thousands_of_ranges(query: PageQuery, arena: Arena, file: int, monkeypatch) -> None:
    monkeypatch.setattr("shuteye.memory.backends.kernel._REGIONS_PER_CALL", 16)
    monkeypatch.setattr(PagemapScanner, "_PAGES_PER_READ", 64)
    arena.map_file(0, arena.nbytes, fd=file)
    for page in random.Random(1).sample(range(NUM_PAGES), NUM_PAGES // 2):
        arena.bytes_view(page * PAGE, 1)[0] = 1
    found = PagemapScanner().ranges(arena.address, arena.nbytes, query)
    assert len(found) > (100 if query is PageQuery.WRITTEN else 0)
    if has_ioctl():
        assert IoctlScanner().ranges(arena.address, arena.nbytes, query) == found


def test_a_kernel_without_the_ioctl_gets_the_fallback(monkeypatch) -> None:
    monkeypatch.setattr("shuteye.memory.backends.kernel._PAGEMAP_SCAN", 0x6600 + 99)
    assert isinstance(open_page_scanner(), PagemapScanner)


def test_touching_ranges_are_joined() -> None:
    assert merge([(0, 2), (2, 3), (5, 6)]) == ((0, 3), (5, 1))
    assert merge([]) == ()
