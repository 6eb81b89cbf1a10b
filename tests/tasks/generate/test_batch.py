"""Packing puts every token at its position and in its slot."""

import numpy as np
import pytest

from shuteye.tasks.generate.plans import Chunk, StepPlan
from shuteye.tasks.generate.runner import PackedBatch


def chunk(token_ids, start, block_ids, *, sample=True):
    return Chunk("r", tuple(token_ids), start, tuple(block_ids), sample)


def test_tokens_positions_and_slots_follow_the_plan():
    plan = StepPlan((chunk([5, 6, 7], 3, [9, 2]), chunk([8], 4, [1, 0]), chunk([1, 2], 0, [4], sample=False)))
    batch = PackedBatch.from_plan(plan, block_size=4)
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 1, 2]
    assert batch.positions.tolist() == [3, 4, 5, 4, 0, 1]
    assert batch.slots.tolist() == [9 * 4 + 3, 2 * 4, 2 * 4 + 1, 0 * 4, 4 * 4, 4 * 4 + 1]
    assert batch.query_starts == (0, 3, 4, 6)
    assert batch.context_lengths == (6, 5, 2)
    assert batch.block_tables == ((9, 2), (1, 0), (4,))
    assert batch.logits_indices.tolist() == [2, 3]
    assert batch.num_tokens == plan.num_tokens


def test_all_indices_are_int64_even_when_nothing_is_sampled():
    """An empty index tensor of another dtype would break indexing on the step that samples nothing."""
    batch = PackedBatch.from_plan(StepPlan((chunk([1, 2], 0, [0], sample=False),)), block_size=4)
    tensors = (batch.input_ids, batch.positions, batch.slots, batch.logits_indices)
    assert {tensor.dtype for tensor in tensors} == {np.dtype(np.int64)}
    assert batch.logits_indices.shape == (0,)


def test_a_table_longer_than_the_context_is_accepted():
    batch = PackedBatch.from_plan(StepPlan((chunk([1], 5, [3, 7, 8, 9]),)), block_size=4)
    assert batch.slots.tolist() == [7 * 4 + 1]


def test_blocks_that_do_not_cover_the_chunk_are_our_bug():
    with pytest.raises(AssertionError, match="do not cover"):
        PackedBatch.from_plan(StepPlan((chunk([1, 2], 3, [0]),)), block_size=4)
