"""The layout of an arena: every byte of every tensor in exactly one place, every page in exactly one extent."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shuteye.memory.layout import (
    DTYPE_NBYTES,
    Extent,
    Layout,
    SampleCursor,
    Slot,
    TensorSpec,
    first_difference,
    plan_layout,
)

PAGE = 4096

dense = st.tuples(
    st.lists(st.integers(0, 40), max_size=3).map(tuple), st.sampled_from(sorted(DTYPE_NBYTES)), st.sampled_from("abc")
)
packed = st.tuples(
    st.tuples(st.integers(1, 70), st.sampled_from((32, 64, 256))), st.just("bfloat16"), st.sampled_from("abc"),
    st.sampled_from(("bf16", "q8_0", "q4_1", "int4_g32_f16_zeros")),
)  # fmt: skip
specs_strategy = st.lists(st.one_of(dense, packed), min_size=1, max_size=20).map(
    lambda drawn: [TensorSpec(f"t{i}", *fields) for i, fields in enumerate(drawn)]
)


@given(specs=specs_strategy, pages_per_extent=st.integers(1, 4))
def test_every_tensor_has_its_own_aligned_place_in_order(specs: list[TensorSpec], pages_per_extent: int) -> None:
    layout = plan_layout(specs, page_bytes=PAGE, extent_bytes=pages_per_extent * PAGE)
    slots = list(layout.slots.values())
    assert [(slot.name, slot.shape, slot.dtype, slot.nbytes) for slot in slots] == [
        (spec.name, spec.shape, spec.dtype, spec.nbytes) for spec in specs
    ]
    assert all(slot.offset % 64 == 0 for slot in slots)
    assert all(left.end <= right.offset for left, right in pairwise(slots))
    assert all(right.offset - left.end < (64 if a.group == b.group else PAGE) for (left, a), (right, b) in
               pairwise(zip(slots, specs, strict=True)))  # fmt: skip
    assert slots[-1].end <= layout.nbytes


def test_a_packed_matrix_takes_the_bytes_of_its_panels() -> None:
    """Would catch a neighbour that lies in a matrix's last panel, or sizes that go by the dtype computed in."""
    specs = [TensorSpec("a", (33, 40), "bfloat16", kind="bf16"), TensorSpec("b", (17, 64), "bfloat16", kind="q4_0")]
    a, b = plan_layout(specs, page_bytes=PAGE).slots.values()
    assert (a.nbytes, b.nbytes) == (2 * 32 * 64 * 2, 2 * 2 * 16 * 18)
    assert b.offset >= a.end


@given(specs=specs_strategy, pages_per_extent=st.integers(1, 4))
def test_extents_tile_the_arena_and_groups_never_share_one(specs: list[TensorSpec], pages_per_extent: int) -> None:
    layout = plan_layout(specs, page_bytes=PAGE, extent_bytes=pages_per_extent * PAGE)
    position = 0
    for index, extent in enumerate(layout.extents):
        assert (extent.index, extent.offset) == (index, position)
        assert 0 < extent.nbytes <= pages_per_extent * PAGE
        assert extent.nbytes % PAGE == 0
        position = extent.end
    assert position == layout.nbytes
    runs: dict[int, set[int]] = {}
    run = 0
    for left, spec in zip([None, *specs], specs, strict=False):
        run += left is not None and left.group != spec.group
        slot = layout.slots[spec.name]
        runs.setdefault(run, set()).update(e.index for e in layout.extents_overlapping(slot.offset, slot.nbytes))
    assert all(not runs[a] & runs[b] for a in runs for b in runs if a < b)


@given(specs=specs_strategy, offset=st.integers(0, 30 * PAGE), nbytes=st.integers(0, 5 * PAGE))
def test_overlapping_extents_are_those_that_share_a_byte(specs: list[TensorSpec], offset: int, nbytes: int) -> None:
    layout = plan_layout(specs, page_bytes=PAGE, extent_bytes=PAGE)
    expected = tuple(e for e in layout.extents if max(e.offset, offset) < min(e.end, offset + nbytes))
    assert layout.extents_overlapping(offset, nbytes) == expected


@given(specs=specs_strategy)
def test_a_layout_survives_json(specs: list[TensorSpec]) -> None:
    layout = plan_layout(specs, page_bytes=PAGE)
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


@pytest.mark.parametrize(
    ("slots", "extents", "nbytes"),
    [
        ({}, [Extent(0, 0, PAGE), Extent(1, 2 * PAGE, PAGE)], 3 * PAGE),
        ({}, [Extent(0, 0, 2 * PAGE), Extent(1, PAGE, PAGE)], 2 * PAGE),
        ({}, [Extent(0, 0, PAGE - 1)], PAGE - 1),
        ({}, [Extent(0, 0, PAGE)], 2 * PAGE),
        ({"a": Slot("a", (PAGE + 1,), "uint8", 0)}, [Extent(0, 0, PAGE)], PAGE),
        ({"a": Slot("a", (8,), "uint8", 0), "b": Slot("b", (8,), "uint8", 7)}, [Extent(0, 0, PAGE)], PAGE),
        ({"a": Slot("b", (8,), "uint8", 0)}, [Extent(0, 0, PAGE)], PAGE),
        ({"a": Slot("a", (8,), "complex3", 0)}, [Extent(0, 0, PAGE)], PAGE),
        ({"a": Slot("a", (64,), "bfloat16", 0, "q8_0")}, [Extent(0, 0, PAGE)], PAGE),
        ({"a": Slot("a", (16, 33), "bfloat16", 0, "q8_0")}, [Extent(0, 0, PAGE)], PAGE),
        ({"a": Slot("a", (16, 32), "bfloat16", 0, "q9_0")}, [Extent(0, 0, PAGE)], PAGE),
    ],
)
def test_a_layout_that_breaks_an_invariant_cannot_be_made(slots, extents, nbytes) -> None:
    with pytest.raises((ValueError, KeyError)):
        Layout(slots, tuple(extents), nbytes, PAGE)


def test_the_first_difference_is_named_in_either_direction() -> None:
    both = [TensorSpec("a", (2,), "float32"), TensorSpec("b", (2,), "float32")]
    one, two = plan_layout(both[:1], page_bytes=PAGE), plan_layout(both, page_bytes=PAGE)
    assert first_difference(one, one) is None
    assert "tensor 'b' should be absent" in str(first_difference(one, two))
    assert "is absent" in str(first_difference(two, one))
    packed = plan_layout([TensorSpec("a", (32, 32), "bfloat16", kind="bf16")], page_bytes=PAGE)
    dense = plan_layout([TensorSpec("a", (32, 32), "bfloat16")], page_bytes=PAGE)
    assert "of kind bf16" in str(first_difference(packed, dense))
    assert "other extents" in str(first_difference(two, plan_layout(both, page_bytes=2 * PAGE)))


def test_the_rota_gives_every_extent_its_turn_within_the_bound() -> None:
    extents = [Extent(i, i * PAGE, PAGE) for i in range(7)]
    rota = SampleCursor(3 * PAGE)
    turns = [[extent.index for extent in rota.take(extents)] for _ in range(4)]
    assert turns == [[0, 1, 2], [3, 4, 5], [6, 0, 1], [2, 3, 4]]


def test_the_rota_takes_one_extent_even_if_it_is_larger_than_the_bound() -> None:
    assert SampleCursor(1).take([Extent(0, 0, PAGE), Extent(1, PAGE, PAGE)]) == [Extent(0, 0, PAGE)]
    assert SampleCursor(1).take([]) == []
