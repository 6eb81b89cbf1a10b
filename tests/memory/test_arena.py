"""Arenas: addresses that stay, views that own nothing, and nothing left behind."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from memory_harness import PAGE

from shuteye.memory.arena import Arena
from shuteye.memory.backends.linux import LinuxBackend
from shuteye.memory.layout import DTYPE_NBYTES, Slot
from shuteye.models.tensors import arena_view, dtype_name, slot_view, torch_dtype


@pytest.fixture
def arena():
    arena = Arena.reserve(LinuxBackend(), tag="weights", nbytes=3 * PAGE + 1)
    yield arena
    arena.close()


def is_mapped(address: int) -> bool:
    ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(start, 16) <= address < int(end, 16) for start, end in ranges)


@pytest.mark.parametrize("name", DTYPE_NBYTES)
def test_every_dtype_has_the_size_that_layouts_count_with(name: str) -> None:
    assert torch_dtype(name).itemsize == DTYPE_NBYTES[name]
    assert dtype_name(torch_dtype(name)) == name


@pytest.mark.parametrize("dtype", DTYPE_NBYTES)
def test_a_view_of_every_dtype_lies_where_it_should(arena: Arena, dtype: str) -> None:
    arena.commit()
    view = arena_view(arena, 64, (2, 3), dtype)
    assert (view.data_ptr(), view.shape, view.dtype) == (arena.address + 64, (2, 3), torch_dtype(dtype))
    view.view(torch.uint8).fill_(7)
    size = 6 * DTYPE_NBYTES[dtype]
    assert bytes(arena.bytes_view(63, size + 2)) == b"\0" + b"\7" * size + b"\0"


def test_views_of_a_slot_of_scalars_and_nothing(arena: Arena) -> None:
    arena.commit()
    assert slot_view(arena, Slot("s", (4,), "float32", 128)).data_ptr() == arena.address + 128
    assert arena_view(arena, 0, (), "int64").shape == ()
    assert arena_view(arena, arena.nbytes, (0, 5), "float32").shape == (0, 5)


def test_size_is_rounded_up_to_whole_pages(arena: Arena) -> None:
    assert arena.nbytes == 4 * PAGE


def test_a_view_made_before_commit_sees_each_memory_that_comes(arena: Arena) -> None:
    view = arena_view(arena, 0, (4,), "int32")
    for value in (1, 2):
        arena.commit()
        assert view.tolist() == [0, 0, 0, 0]
        view.fill_(value)
        arena.release()


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 1), (0, 4 * PAGE + 1), (4 * PAGE, 1)])
def test_nothing_outside_can_be_viewed(arena: Arena, offset: int, nbytes: int) -> None:
    with pytest.raises(AssertionError, match="not inside"):
        arena_view(arena, offset, (nbytes,), "uint8")
    with pytest.raises(AssertionError, match="not inside"):
        arena.bytes_view(offset, nbytes)


def test_addresses_are_given_back_when_the_last_view_is_gone_and_not_before() -> None:
    arena = Arena.reserve(LinuxBackend(), tag="weights", nbytes=PAGE)
    arena.commit()
    view = arena_view(arena, 0, (8,), "uint8")[2:4]
    arena.close()
    gc.collect()
    assert is_mapped(arena.address), "a stray view must crash, not read whatever is mapped there next"
    del view
    gc.collect()
    assert not is_mapped(arena.address)


def test_a_closed_arena_holds_no_memory_and_gives_no_views() -> None:
    arena = Arena.reserve(LinuxBackend(), tag="weights", nbytes=PAGE)
    arena.commit()
    arena.bytes_view(0, 1)[0] = 1
    view = arena_view(arena, 0, (8,), "uint8")
    arena.close()
    arena.close()
    assert LinuxBackend().resident_bytes(arena.address, PAGE) == 0
    with pytest.raises(AssertionError, match="closed"):
        arena_view(arena, 0, (1,), "uint8")
    del view


def test_an_arena_of_no_bytes_asks_the_backend_for_nothing():
    """The KV cache of a model that has none: a length of 0 is an error to the kernel."""
    arena = Arena.reserve(LinuxBackend(), tag="kv_cache", nbytes=0)
    arena.commit()
    arena.populate()
    assert (arena.nbytes, arena.resident_bytes()) == (0, 0)
    arena.release()
    arena.close()
