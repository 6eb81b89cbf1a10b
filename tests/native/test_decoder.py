"""Whole native steps against the same model as a torch loop, on tiny models of every recognised kind."""

import threading
from typing import Any

import pytest
import torch
from random_decoders import (
    KINDS,
    NUM_BLOCKS,
    NUM_LAYERS,
    VOCAB,
    CacheArena,
    Kind,
    facts_of,
    frequencies_of,
    make_weights,
    mixed_steps,
    pack,
    tokens,
)

from shuteye import native
from shuteye.models.fused import FusedDecoder, decoder_spec
from shuteye.tasks.generate.plans import Chunk
from shuteye.tasks.generate.runner import PackedBatch


class Pair:
    """One random model bound to torch and to the native decoder, each with a cache of its own."""

    def __init__(self, kind: Kind, dtype: torch.dtype) -> None:
        weights = make_weights(kind, dtype)
        facts = facts_of(kind)
        self.frequencies = frequencies_of(kind)
        self.dtype = dtype
        self.torch_arena, self.native_arena = CacheArena(kind, dtype), CacheArena(kind, dtype)
        self.fused = FusedDecoder(facts, weights, self.frequencies, kind.windows, native=False)
        self.native = native.NativeDecoder.create(decoder_spec(facts, weights, kind.windows, self.native_arena.blocks))

    def by_native(self, batch: PackedBatch) -> torch.Tensor:
        angles = torch.outer(torch.from_numpy(batch.positions).float(), self.frequencies).repeat(1, 2)
        return self.native.forward(
            torch.from_numpy(batch.input_ids), angles.cos().to(self.dtype), angles.sin().to(self.dtype),
            torch.from_numpy(batch.slots), batch.query_starts, batch.context_lengths, batch.block_tables,
            torch.from_numpy(batch.logits_indices),
        )  # fmt: skip

    @torch.inference_mode()
    def by_torch(self, batch: PackedBatch) -> torch.Tensor:
        return self.fused.forward(batch, self.torch_arena.cache).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(KINDS))
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_steps_equal_the_torch_loop(level, name, dtype, threads):
    """Logits and the caches' contents; NaN from a poisoned block anywhere would show."""
    native.set_num_threads(threads)
    pair = Pair(KINDS[name], dtype)
    for step in mixed_steps():
        batch = pack(*step)
        found, expected = pair.by_native(batch), pair.by_torch(batch)
        assert found.shape == expected.shape
        if expected.numel():
            scale = expected.abs().max().item()
            tolerance = 2e-5 if dtype == torch.float32 else 0.04
            torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)
            if dtype == torch.float32:
                assert torch.equal(found.argmax(-1), expected.argmax(-1))
    written = pair.torch_arena.blocks.isnan().logical_not()
    assert torch.equal(written, pair.native_arena.blocks.isnan().logical_not())


def test_results_do_not_depend_on_threads(level):
    """Who computes what is decided by a race; what is computed must not be."""
    results = []
    for threads in (1, 2, 4, 3):
        native.set_num_threads(threads)
        pair = Pair(KINDS["smollm"], torch.bfloat16)
        results.append([pair.by_native(pack(*step)) for step in mixed_steps()])
    for other in results[1:]:
        assert all(torch.equal(left, right) for left, right in zip(results[0], other, strict=True))


def test_callers_from_several_threads_take_turns(level):
    """Two decoders, and one decoder from two threads, at once: each answer as if alone."""
    native.set_num_threads(2)
    pairs = [Pair(KINDS["llama"], torch.float32), Pair(KINDS["qwen3"], torch.float32)]
    batches = [pack(Chunk("a", tokens(20, 1), 0, (1, 2, 3), True)) for pair in pairs]
    expected = [pair.by_native(batch) for pair, batch in zip(pairs, batches, strict=True)]
    wrong: list[Any] = []

    def repeat(index: int) -> None:
        answers = (pairs[index].by_native(batches[index]) for _ in range(60))
        wrong.extend(answer for answer in answers if not torch.equal(answer, expected[index]))

    threads = [threading.Thread(target=repeat, args=(index,)) for index in (0, 1, 0)]
    for thread in threads:
        thread.start()
    for count in (3, 1, 4, 2) * 5:  # while they run
        native.set_num_threads(count)
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": (VOCAB,)}, "token id is not in the vocabulary"),
        ({"block_ids": (NUM_BLOCKS,)}, "slot is not in the cache"),
        ({"token_ids": tokens(513, 0), "block_ids": tuple(range(65))}, "more tokens than max_tokens"),
    ],
)
def test_refuses_what_would_reach_outside(level, change, message):
    pair = Pair(KINDS["llama"], torch.float32)
    settings: dict[str, Any] = {"token_ids": (1,), "block_ids": (0,)} | change
    with pytest.raises(ValueError, match=message):
        pair.by_native(pack(Chunk("a", settings["token_ids"], 0, settings["block_ids"], True)))


def test_refuses_other_dtypes():
    pair = Pair(KINDS["llama"], torch.float32)
    weights = make_weights(KINDS["llama"], torch.float16)
    facts = facts_of(KINDS["llama"])
    with pytest.raises(ValueError, match="float16"):
        native.NativeDecoder.create(decoder_spec(facts, weights, (None,) * NUM_LAYERS, pair.native_arena.blocks.half()))
