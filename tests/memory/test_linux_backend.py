"""The verbs on host memory, by what the process and the kernel can see."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from memory_harness import PAGE

from shuteye.errors import BackendFailure, InvalidRequest, MemoryExhausted
from shuteye.memory.arena import Arena
from shuteye.memory.backends import open_backend
from shuteye.memory.backends.fake import FakeBackend
from shuteye.memory.backends.linux import LinuxBackend


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture
def backend() -> LinuxBackend:
    return LinuxBackend()


@pytest.fixture
def arena(backend: LinuxBackend):
    arena = Arena.reserve(backend, tag="weights", nbytes=16 * PAGE)
    yield arena
    arena.close()


@pytest.mark.parametrize("state", ["reserved", "released"])
def test_touching_memory_that_is_not_there_crashes_instead_of_reading_zeros(state: str) -> None:
    code = """
        import ctypes, mmap, sys
        from shuteye.memory.backends.linux import LinuxBackend
        backend = LinuxBackend()
        address = backend.reserve(mmap.PAGESIZE)
        if sys.argv[1] == "released":
            backend.commit(address, mmap.PAGESIZE)
            ctypes.memset(address, 1, mmap.PAGESIZE)
            backend.release(address, mmap.PAGESIZE)
        print("still here", flush=True)
        print(ctypes.string_at(address, 1))
    """
    result = run_python(code, state)
    assert (result.stdout, result.returncode) == ("still here\n", -signal.SIGSEGV), result.stderr


def test_reservations_are_aligned_for_huge_pages(backend: LinuxBackend) -> None:
    for nbytes in (PAGE, 3 << 20):
        address = backend.reserve(nbytes)
        assert address % (2 << 20) == 0
        backend.unreserve(address, nbytes)


def test_a_reservation_beyond_the_address_space_is_refused(backend: LinuxBackend) -> None:
    with pytest.raises(MemoryExhausted, match="Cannot allocate memory"):
        backend.reserve(1 << 60)


def test_more_memory_than_there_is_is_refused_when_asked_for_not_when_touched(backend: LinuxBackend) -> None:
    nbytes = backend.available_bytes() // PAGE * PAGE + (1 << 34)
    arena = Arena.reserve(backend, tag="kv_cache", nbytes=nbytes)
    with pytest.raises(MemoryExhausted, match="are available"):
        arena.commit()
    arena.close()


def test_writes_to_a_mapped_file_stay_private(backend: LinuxBackend, arena: Arena, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"f" * arena.nbytes)
    with path.open("rb") as file:
        arena.map_file(0, arena.nbytes, fd=file.fileno())
    arena.bytes_view(100, 5)[:] = b"mine!"
    assert path.read_bytes() == b"f" * arena.nbytes
    assert arena.written_ranges() == ((0, PAGE),)


def test_populating_without_the_newer_madvise_reads_every_page(arena: Arena, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"f" * arena.nbytes)
    with path.open("rb") as file:
        arena.map_file(0, arena.nbytes, fd=file.fileno())
    monkeypatch.setattr(LinuxBackend, "_advise", lambda *_: errno.EINVAL)
    LinuxBackend().populate(arena.address, arena.nbytes)
    assert arena.resident_bytes() == arena.nbytes


def test_populating_nothing_fails(arena: Arena) -> None:
    with pytest.raises((BackendFailure, MemoryExhausted), match="populate"):
        arena.populate()


def test_a_range_is_written_to_its_offset_and_nowhere_else(backend: LinuxBackend, arena: Arena, tmp_path: Path) -> None:
    arena.commit()
    arena.bytes_view(PAGE, PAGE)[:] = b"x" * PAGE
    with (tmp_path / "file").open("w+b") as file:
        arena.write_file(PAGE, PAGE, fd=file.fileno())
        backend.sync_file(file.fileno())
        assert file.read() == bytes(PAGE) + b"x" * PAGE


def test_errors_of_the_kernel_name_the_verb_and_the_reason(backend: LinuxBackend, arena: Arena) -> None:
    arena.commit()
    with pytest.raises(BackendFailure, match=r"write_file of 4,096 bytes.*Bad file descriptor"):
        arena.write_file(0, PAGE, fd=-1)
    with pytest.raises(BackendFailure, match=r"map_file.*Bad file descriptor"):
        arena.map_file(0, PAGE, fd=-1)
    reader, writer = os.pipe()
    with pytest.raises(BackendFailure, match=r"sync_file of descriptor \d+ failed: Invalid argument"):
        backend.sync_file(writer)
    os.close(reader)
    os.close(writer)
    with pytest.raises(BackendFailure, match=r"release.*Invalid argument"):
        backend.release(arena.address + 1, PAGE)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_exhaustion_not_a_broken_kernel(arena: Arena) -> None:
    arena.commit()
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(MemoryExhausted, match="No space left"):
            arena.write_file(0, PAGE, fd=fd)
    finally:
        os.close(fd)


def test_the_process_is_at_least_as_large_as_an_arena_in_it(backend: LinuxBackend) -> None:
    arena = Arena.reserve(backend, tag="kv_cache", nbytes=32 << 20)
    before = backend.process_resident_bytes()
    arena.commit()
    arena.bytes_view(0, arena.nbytes)[:] = b"\1" * arena.nbytes
    assert backend.process_resident_bytes() - before >= 31 << 20
    arena.close()


def test_backends_are_chosen_by_name() -> None:
    assert isinstance(open_backend("auto"), LinuxBackend)
    assert isinstance(open_backend("linux"), LinuxBackend)
    assert isinstance(open_backend("fake"), FakeBackend)
    with pytest.raises(InvalidRequest, match="not built yet"):
        open_backend("cuda")
    with pytest.raises(InvalidRequest, match="got 'abacus'"):
        open_backend("abacus")  # type: ignore[arg-type]
