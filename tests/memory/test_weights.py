"""The pure moves of weights: which are allowed, and what brings each extent back after them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from shuteye.errors import TransitionConflict
from shuteye.memory.image import WeightImage
from shuteye.memory.weights import Run, WeightsState

PAGE = 4096


@pytest.fixture
def state(image_paths: tuple[Path, Path]) -> Iterator[WeightsState]:
    image = WeightImage.open(image_paths[0])
    yield WeightsState.initial(image)
    image.close()


ALLOWED = {
    ("resident", "offload"), ("offloaded", "offload"),
    ("resident", "discard"), ("offloaded", "discard"), ("discarded", "discard"), ("blank", "discard"),
    ("offloaded", "restore"), ("resident", "restore"),
    ("resident", "reload"), ("offloaded", "reload"), ("discarded", "reload"), ("blank", "reload"),
    ("offloaded", "blank"), ("discarded", "blank"), ("blank", "blank"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("residency", "move"),
    list(
        product(["resident", "offloaded", "discarded", "blank"], ["offload", "discard", "restore", "reload", "blank"])
    ),
)
def test_the_table_of_moves(state: WeightsState, residency: str, move) -> None:
    there = {
        "resident": state.restored(),
        "offloaded": state,
        "discarded": state.discarded(),
        "blank": state.blank(),
    }[residency]
    assert there.residency == residency
    assert there.is_mapped == (residency in ("resident", "blank"))
    if (residency, move) in ALLOWED:
        there.require(move)
    else:
        with pytest.raises(TransitionConflict, match=residency):
            there.require(move)


def test_neighbours_of_one_source_are_one_run(state: WeightsState) -> None:
    assert list(state.runs()) == [Run("image", 0, 7 * PAGE)]
    mixed = state.restored().offloaded({1, 2})
    assert list(mixed.runs()) == [
        Run("image", 0, PAGE),
        Run("saved", PAGE, 5 * PAGE),
        Run("image", 6 * PAGE, PAGE),
    ]


def test_what_was_saved_once_stays_saved_until_reloaded(state: WeightsState) -> None:
    twice = state.restored().offloaded({1}).restored().offloaded({3})
    assert twice.sources == ("image", "saved", "image", "saved")
    assert set(twice.reloaded(state.image).sources) == {"image"}


def test_memory_that_no_file_holds_cannot_be_offloaded_unsaved(state: WeightsState) -> None:
    written = state.blank().restored()
    with pytest.raises(AssertionError):
        written.offloaded({0, 1, 2})
    assert set(written.offloaded({0, 1, 2, 3}).sources) == {"saved"}
