"""Paged attention refuses what it would otherwise drop, and never runs without its context."""

from types import SimpleNamespace

import pytest
import torch

from shuteye.cache.kv_cache import KVCache
from shuteye.cache.kv_layout import KVLayout
from shuteye.errors import UnsupportedModel
from shuteye.models.attention import AttentionContext, attending, paged_attention
from shuteye.tasks.generate.plans import Chunk, StepPlan
from shuteye.tasks.generate.runner import PackedBatch

WINDOWS = (None, 1, 3, 16, 100)
MODULE = SimpleNamespace(layer_idx=0)


class HeapArena:
    def bytes_view(self, offset, nbytes):
        return memoryview(bytearray(nbytes))


@pytest.fixture
def context():
    cache = KVCache(HeapArena(), KVLayout(1, 4, 2, 8, "float32"), num_blocks=4)
    batch = PackedBatch.from_plan(StepPlan((Chunk("r", (1, 2, 3), 0, (2,), True),)), block_size=4)
    return AttentionContext(batch, cache, (None,))


def tensors():
    return torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        ({"s_aux": torch.zeros(4)}, "attention sinks"),
        ({"softcap": 50.0}, "softcapping"),
        ({"position_bias": torch.zeros(1)}, "position bias"),
        ({"dropout": 0.1}, "dropout"),
        ({"is_causal": False}, "causal"),
        ({"something_new": 3}, "something new"),
    ],
)
def test_arguments_that_change_the_result_are_refused(context, arguments, cause):
    with attending(context), pytest.raises(UnsupportedModel, match=cause):
        paged_attention(MODULE, *tensors(), None, **arguments)


def test_a_given_mask_is_refused(context):
    with attending(context), pytest.raises(UnsupportedModel, match="attention mask"):
        paged_attention(MODULE, *tensors(), torch.zeros(1, 1, 3, 3))


def test_harmless_arguments_are_ignored(context):
    with attending(context):
        found, _ = paged_attention(MODULE, *tensors(), None, position_ids=torch.arange(3), softcap=None, dropout=0.0)
    assert found.shape == (1, 3, 4, 8)


def test_contexts_do_not_nest_and_end_with_an_error_too(context):
    with attending(context), pytest.raises(AssertionError, match="running already"), attending(context):
        pass
    with pytest.raises(RuntimeError), attending(context):
        raise RuntimeError
    with pytest.raises(AssertionError, match="attending"):
        paged_attention(MODULE, *tensors(), None)


@pytest.mark.parametrize(("window", "held"), [(None, "int8"), (3, "float16"), *((w, "float32") for w in WINDOWS)])
def test_mixed_steps_equal_dense_attention(window, held):
    """Prefills, chunks and decodes of one step, against one dense attention per sequence.

    Over keys and values as the cache holds them: a prompt's own, too, or its chunks would show.
    """
    generator = torch.Generator().manual_seed(0)
    cache = KVCache(HeapArena(), KVLayout(1, 4, 2, 8, held), num_blocks=40)
    whole = [torch.randn(3, length, 4, 8, generator=generator) for length in (20, 9, 13, 1, 17)]
    starts, block_ids = (0, 8, 4, 0, 16), torch.randperm(40, generator=generator).view(5, 8).tolist()
    for computed in (0, 1):  # first what came before, then the step under test
        spans = [(start, len(each[0])) if computed else (0, start) for start, each in zip(starts, whole, strict=True)]
        live = [index for index, (first, last) in enumerate(spans) if last > first]
        chunks = [Chunk("r", (0,) * (spans[i][1] - spans[i][0]), spans[i][0], tuple(block_ids[i]), True) for i in live]
        batch = PackedBatch.from_plan(StepPlan(tuple(chunks)), block_size=4)
        query, keys, values = (
            torch.cat([whole[i][kind][spans[i][0] : spans[i][1]] for i in live]).transpose(0, 1)[None]
            for kind in range(3)
        )
        with attending(AttentionContext(batch, cache, (window,))):
            found = paged_attention(MODULE, query, keys[:, :2], values[:, :2], None)[0][0]
    for each in whole:
        each[1:] = as_held(each[1:], held)
    expected = torch.cat([dense(each, window)[start:] for start, each in zip(starts, whole, strict=True)])
    torch.testing.assert_close(found, expected)


def as_held(heads, dtype):
    if dtype != "int8":
        return heads.to(getattr(torch, dtype)).float()
    scale = heads.abs().amax(-1, keepdim=True) / 127
    return (heads / scale).round() * scale


def dense(sequence, window):
    query, keys, values = (each.transpose(0, 1) for each in sequence)
    keys, values = (each[:2].repeat_interleave(2, 0) for each in (keys, values))
    behind = torch.arange(query.shape[1])[:, None] - torch.arange(query.shape[1])
    seen = (behind >= 0) & (behind < (window or 10_000))
    scores = (query @ keys.transpose(1, 2) / 8**0.5).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ values).transpose(0, 1)
