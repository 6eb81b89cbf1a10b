"""The fake must really fail where it is told to, or every test built on it proves nothing."""

from __future__ import annotations

import pytest
from memory_harness import PAGE

from shuteye.errors import BackendFailure, MemoryExhausted
from shuteye.memory.arena import Arena
from shuteye.memory.backends.fake import POISON, FakeBackend


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def arena(backend: FakeBackend):
    arena = Arena.reserve(backend, tag="weights", nbytes=2 * PAGE)
    yield arena
    backend.clear()
    arena.close()


def test_fresh_memory_is_poisoned(arena: Arena) -> None:
    arena.commit()
    assert bytes(arena.bytes_view(0, arena.nbytes)) == bytes([POISON]) * arena.nbytes


def test_every_verb_is_recorded_in_order(backend: FakeBackend, arena: Arena) -> None:
    arena.commit()
    arena.resident_bytes()
    arena.release()
    assert backend.steps == ["reserve", "commit", "resident_bytes", "release"]


def test_a_fault_before_a_step_leaves_it_undone_and_a_fault_after_it_done(backend: FakeBackend, arena: Arena) -> None:
    arena.commit()
    backend.fail_at(0, when="before")
    with pytest.raises(BackendFailure, match="Injected at 0"):
        arena.release()
    assert arena.resident_bytes() == arena.nbytes
    backend.fail_next("release", when="after", error=MemoryExhausted("mine"))
    with pytest.raises(MemoryExhausted, match="mine"):
        arena.release()
    assert arena.resident_bytes() == 0


def test_an_injected_fault_counts_steps_from_now_and_fires_once(backend: FakeBackend, arena: Arena) -> None:
    arena.commit()
    backend.fail_at(1)
    arena.resident_bytes()
    with pytest.raises(BackendFailure):
        arena.resident_bytes()
    arena.resident_bytes()


def test_clearing_forgets_steps_and_failures(backend: FakeBackend, arena: Arena) -> None:
    backend.fail_at(0)
    backend.fail_next("commit")
    backend.clear()
    arena.commit()
    assert backend.steps == ["commit"]


def test_memory_can_be_made_scarce(backend: FakeBackend, arena: Arena) -> None:
    backend.available = PAGE
    with pytest.raises(MemoryExhausted, match="4,096 are available"):
        arena.commit()
    assert backend.available_bytes() == PAGE


def test_mapping_and_written_ranges_are_those_of_linux(backend: FakeBackend, arena: Arena, tmp_path) -> None:
    with (tmp_path / "file").open("w+b") as file:
        file.write(b"a" * arena.nbytes)
        file.flush()
        arena.map_file(0, arena.nbytes, fd=file.fileno())
        arena.populate()
        assert arena.written_ranges() == ()
        arena.bytes_view(0, 1)[0] = 1
        assert arena.written_ranges() == ((0, PAGE),)
        arena.write_file(0, 1, fd=file.fileno())
        backend.sync_file(file.fileno())
        assert (tmp_path / "file").read_bytes()[:2] == b"\x01a"
    assert backend.process_resident_bytes() > 0
    address = backend.reserve(PAGE)
    backend.unreserve(address, PAGE)
