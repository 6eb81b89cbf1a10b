"""Backings on their own: what is saved comes back, and a failure leaves nothing half-true."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from memory_harness import PAGE, open_fds

from shuteye.errors import BackendFailure, MemoryExhausted
from shuteye.memory.arena import Arena
from shuteye.memory.backends.fake import FakeBackend
from shuteye.memory.backings import DiskBacking, HostBacking
from shuteye.memory.image import WeightImage
from shuteye.memory.image_files import checksum_hex
from shuteye.memory.layout import Extent

EXTENTS = (Extent(0, 0, PAGE), Extent(1, PAGE, 2 * PAGE), Extent(2, 3 * PAGE, PAGE))


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def arena(backend: FakeBackend):
    arena = Arena.reserve(backend, tag="weights", nbytes=4 * PAGE)
    arena.commit()
    for page in range(4):
        arena.bytes_view(page * PAGE, PAGE)[:] = bytes([page + 1]) * PAGE
    yield arena
    backend.clear()
    arena.close()


@pytest.fixture(params=["disk", "host"])
def backing(request, backend: FakeBackend, tmp_path: Path):
    made = DiskBacking(backend, tmp_path / "spill") if request.param == "disk" else HostBacking(backend)
    assert made.name == request.param
    yield made
    made.drop()


def test_saved_extents_come_back_and_the_others_do_not(backing, arena: Arena) -> None:
    backing.save(arena, (EXTENTS[0], EXTENTS[2]))
    arena.release()
    backing.load(arena, 0, PAGE)
    backing.load(arena, 3 * PAGE, PAGE)
    assert arena.bytes_view(0, PAGE) == b"\1" * PAGE
    assert arena.bytes_view(3 * PAGE, PAGE) == b"\4" * PAGE
    assert backing.checksum(EXTENTS[0]) == checksum_hex(b"\1" * PAGE)
    assert backing.checksum(EXTENTS[1]) is None


def test_a_loaded_extent_is_clean_until_written_and_its_copy_stays_true(backing, arena: Arena) -> None:
    backing.save(arena, EXTENTS)
    backing.load(arena, 0, arena.nbytes)
    arena.populate()
    assert arena.written_ranges() == ()
    arena.bytes_view(PAGE, 1)[0] = 77
    assert arena.written_ranges() == ((PAGE, PAGE),)
    backing.load(arena, 0, arena.nbytes)
    assert arena.bytes_view(PAGE, 1)[0] == 2


def test_saving_over_the_file_that_is_mapped_keeps_memory_as_it_is(backing, arena: Arena) -> None:
    backing.save(arena, EXTENTS)
    backing.load(arena, 0, arena.nbytes)
    arena.bytes_view(2 * PAGE, 1)[0] = 77
    before = bytes(arena.bytes_view(0, arena.nbytes))
    backing.save(arena, (EXTENTS[1],))
    assert arena.bytes_view(0, arena.nbytes) == before
    backing.load(arena, 0, arena.nbytes)
    assert arena.bytes_view(0, arena.nbytes) == before


@pytest.mark.parametrize("verb", ["write_file", "sync_file"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_after_a_failed_save_no_copy_is_claimed(backing, backend: FakeBackend, arena: Arena, verb: str, when) -> None:
    backing.save(arena, EXTENTS)
    backend.fail_next(verb, when=when)
    with pytest.raises(BackendFailure):
        backing.save(arena, (EXTENTS[1],))
    assert [backing.checksum(extent) is None for extent in EXTENTS] == [False, True, False]
    backing.save(arena, (EXTENTS[1],))
    assert backing.checksum(EXTENTS[1]) is not None


def test_dropping_gives_back_the_room_and_is_idempotent(backing, arena: Arena) -> None:
    before = open_fds()
    backing.save(arena, EXTENTS)
    assert open_fds() > before
    backing.drop()
    backing.drop()
    assert open_fds() == before
    assert backing.checksum(EXTENTS[0]) is None
    with pytest.raises(AssertionError, match="nothing was saved"):
        backing.load(arena, 0, PAGE)


def test_one_sync_for_all_extents_after_all_writes(backing, backend: FakeBackend, arena: Arena) -> None:
    backend.clear()
    backing.save(arena, EXTENTS)
    assert [step for step in backend.steps if step != "available_bytes"] == ["write_file"] * 3 + ["sync_file"]


def test_a_spill_file_has_no_name_and_only_the_saved_blocks(backend: FakeBackend, arena: Arena, tmp_path: Path) -> None:
    backing = DiskBacking(backend, tmp_path / "spill")
    before = open_fds()
    backing.save(arena, (EXTENTS[2],))
    (fd,) = open_fds() - before
    status = os.fstat(fd)
    assert (status.st_nlink, status.st_size, status.st_mode & 0o777) == (0, 4 * PAGE, 0o600)
    assert status.st_blocks * 512 < 4 * PAGE
    assert list((tmp_path / "spill").iterdir()) == []
    backing.drop()


def test_a_full_disk_is_found_before_writing(backend: FakeBackend, arena: Arena, tmp_path: Path, monkeypatch) -> None:
    backing = DiskBacking(backend, tmp_path)
    monkeypatch.setattr(backing, "free_bytes", lambda: 4 * PAGE - 1)
    backend.clear()
    with pytest.raises(MemoryExhausted, match=f"16,384 bytes and the spill directory {tmp_path} has 16,383 left"):
        backing.save(arena, EXTENTS)
    assert backend.steps == []


def test_saving_in_place_needs_no_room_of_its_own(backing, arena: Arena, monkeypatch) -> None:
    """Would catch a refusal on a full disk although the file owns every block that is written."""
    backing.save(arena, EXTENTS[:2])
    monkeypatch.setattr(backing, "free_bytes", lambda: 0)
    assert [backing.growth_bytes(extents) for extents in (EXTENTS[:2], EXTENTS[1:], ())] == [0, PAGE, 0]
    backing.save(arena, EXTENTS[:2])
    with pytest.raises(MemoryExhausted):
        backing.save(arena, EXTENTS)
    backing.drop()
    assert backing.growth_bytes(EXTENTS) == 4 * PAGE


@pytest.mark.parametrize("verb", ["write_file", "sync_file"])
def test_blocks_are_owned_once_they_are_safe(backing, backend: FakeBackend, arena: Arena, verb: str) -> None:
    """Would catch room that is counted twice: that of a save which broke off may not be there."""
    backend.fail_next(verb)
    with pytest.raises(BackendFailure):
        backing.save(arena, EXTENTS)
    assert backing.growth_bytes(EXTENTS) == 4 * PAGE


@pytest.mark.parametrize("step", ["ftruncate", "dup"])
def test_a_file_that_cannot_be_made_leaves_nothing(backing, arena: Arena, tmp_path: Path, monkeypatch, step) -> None:
    """Would catch a descriptor, or a file with a name, that every failed sleep leaves behind."""

    def refuse(*_args, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = open_fds()
    monkeypatch.setattr(os, step, refuse)
    if step == "ftruncate" or backing.name == "disk":
        with pytest.raises(MemoryExhausted):
            backing.save(arena, EXTENTS)
    monkeypatch.undo()
    assert open_fds() == before
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
    backing.save(arena, EXTENTS)


def test_a_spill_directory_that_cannot_be_made_is_named(backend: FakeBackend, arena: Arena, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    backing = DiskBacking(backend, tmp_path / "file" / "spill")
    with pytest.raises(BackendFailure, match="Not a directory"):
        backing.save(arena, EXTENTS)


def test_host_memory_is_measured_where_it_is_limited(backend: FakeBackend, arena: Arena) -> None:
    backend.available = PAGE
    backing = HostBacking(backend)
    assert backing.free_bytes() == PAGE
    with pytest.raises(MemoryExhausted, match="host memory has 4,096 left"):
        backing.save(arena, EXTENTS)


def test_an_image_is_loaded_and_known_as_a_backing_is(backend: FakeBackend, image_paths: tuple[Path, Path]) -> None:
    image = WeightImage.open(image_paths[0])
    arena = Arena.reserve(backend, tag="weights", nbytes=image.layout.nbytes)
    image.load(arena, 0, arena.nbytes)
    for extent in image.layout.extents:
        assert image.checksum(extent) == checksum_hex(arena.bytes_view(extent.offset, extent.nbytes))
    arena.close()
    image.close()
