"""Whole native steps against the same model as a torch loop, on tiny models of every recognised kind."""

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from panels import Panels
from random_decoders import (
    KINDS,
    NUM_BLOCKS,
    VOCAB,
    CacheArena,
    Kind,
    facts_of,
    flat,
    frequencies_of,
    make_weights,
    mixed_steps,
    native_forward,
    pack,
    tokens,
)

from shuteye import native
from shuteye.models.fused import FusedDecoder
from shuteye.models.native_loop import NativeLoop
from shuteye.tasks.generate.plans import Chunk
from shuteye.tasks.generate.runner import PackedBatch


class Pair:
    """One random model bound to torch and to the native decoder, each with a cache of its own."""

    def __init__(
        self, kind: Kind, dtype: torch.dtype, *, packed: bool = False, held: torch.dtype | None = None
    ) -> None:
        self.weights = make_weights(kind, dtype)
        facts, weights = facts_of(kind), flat(kind, self.weights, kind.windows)
        self.frequencies = frequencies_of(kind)
        self.torch_arena, self.native_arena = CacheArena(kind, held or dtype), CacheArena(kind, held or dtype)
        self.fused = FusedDecoder(facts, weights, self.frequencies, kind.windows, native=False)
        self.spec = NativeLoop(facts, weights, self.frequencies)._spec(self.native_arena.cache)
        self.panels = Panels()
        self.native = native.NativeDecoder.create(self.panels.of_decoder(self.spec) if packed else self.spec)

    def by_native(self, batch: PackedBatch) -> torch.Tensor:
        return native_forward(self.native, batch, self.frequencies, self.spec.dtype)

    def by_torch(self, batch: PackedBatch) -> torch.Tensor:
        return torch.from_numpy(self.fused.forward(batch, self.torch_arena.cache))


@pytest.mark.parametrize("form", ["float32", "bfloat16", "panels"])
@pytest.mark.parametrize("name", list(KINDS))
@pytest.mark.parametrize("threads", [1, 3])
def test_steps_equal_the_torch_loop(level, name, form, threads):
    """Logits and the caches' contents; NaN from a poisoned block anywhere would show."""
    native.set_num_threads(threads)
    dtype = torch.float32 if form == "float32" else torch.bfloat16
    pair = Pair(KINDS[name], dtype, packed=form == "panels")
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
    assert torch.equal(pair.torch_arena.written, pair.native_arena.written)


@pytest.mark.parametrize("held", [torch.float16, torch.int8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_over_other_caches_equal_the_torch_loop(level, dtype, held):
    """A cache that is read as another, or a scale of another token or head."""
    pair = Pair(KINDS["smollm"], dtype, held=held)
    for step in mixed_steps():
        batch = pack(*step)
        found, expected = pair.by_native(batch), pair.by_torch(batch)
        if expected.numel():
            tolerance = {torch.float32: 0.01 if held == torch.int8 else 2e-4, torch.bfloat16: 0.04}[dtype]
            torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * expected.abs().max().item())
    assert torch.equal(pair.torch_arena.written, pair.native_arena.written)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "panels"])
def test_results_do_not_depend_on_threads(level, packed):
    """Who computes what is decided by a race; what is computed must not be."""
    results = []
    for threads in (1, 2, 4, 3):
        native.set_num_threads(threads)
        pair = Pair(KINDS["smollm"], torch.bfloat16, packed=packed)
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
        answers = (pairs[index].by_native(batches[index]) for _ in range(20))
        wrong.extend(answer for answer in answers if not torch.equal(answer, expected[index]))

    threads = [threading.Thread(target=repeat, args=(index,)) for index in (0, 1, 0)]
    for thread in threads:
        thread.start()
    for count in (3, 1, 4, 2) * 2:  # while they run
        native.set_num_threads(count)
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": (VOCAB,)}, "token id is not in the vocabulary"),
        ({"block_ids": (NUM_BLOCKS,)}, "slot is not in the cache"),
    ],
)
def test_refuses_what_would_reach_outside(level, change, message):
    pair = Pair(KINDS["llama"], torch.float32)
    settings: dict[str, Any] = {"token_ids": (1,), "block_ids": (0,)} | change
    with pytest.raises(ValueError, match=message):
        pair.by_native(pack(Chunk("a", settings["token_ids"], 0, settings["block_ids"], True)))


def test_a_step_may_be_larger_than_what_is_computed_at_a_time(level):
    """Pieces that do not find the tokens before them, or whose logits go to other rows."""
    pair = Pair(KINDS["mistral"], torch.float32)
    small = replace(pair.spec, max_tokens=37)
    by_pieces = native.NativeDecoder.create(small)
    for step in mixed_steps():
        batch = pack(*step)
        expected = pair.by_native(batch)
        found = native_forward(by_pieces, batch, pair.frequencies, pair.spec.dtype)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_refuses_other_dtypes():
    """Numbers that would be read as others."""
    spec = Pair(KINDS["llama"], torch.float32).spec
    with pytest.raises(ValueError, match="float16"):
        native.NativeDecoder.create(replace(spec, dtype="float16"))
    with pytest.raises(ValueError, match="a KV cache of float32 for a model of bfloat16"):
        native.NativeDecoder.create(replace(spec, dtype="bfloat16"))
