"""Whole native steps against the same model as a torch loop, on tiny models of every recognised kind."""

import threading
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from shuteye import native
from shuteye.cache.kv_cache import KVCache
from shuteye.models.fused import FusedDecoder, FusedSpec, FusedWeights, Layer, Projection, decoder_spec
from shuteye.tasks.generate.plans import Chunk, Scoring, StepPlan
from shuteye.tasks.generate.runner import PackedBatch

BLOCK_SIZE, NUM_BLOCKS, HIDDEN, INNER, VOCAB, NUM_LAYERS = 8, 65, 72, 104, 131, 3


@dataclass(frozen=True)
class Kind:
    """What distinguishes the recognised architectures."""

    heads: int
    kv_heads: int
    head_dim: int
    biased: bool = False
    head_norms: bool = False
    windows: tuple[int | None, ...] = (None,) * NUM_LAYERS


KINDS = {
    "llama": Kind(4, 2, 16),
    "smollm": Kind(9, 3, 8),
    "qwen2": Kind(4, 1, 20, biased=True),
    "qwen3": Kind(6, 2, 16, head_norms=True),
    "mistral": Kind(4, 4, 16, windows=(7, None, 19)),
}


class _Arena:
    """A poisoned KV cache: every block holds NaN until it is written."""

    def __init__(self, kind: Kind, dtype: torch.dtype) -> None:
        shape = (NUM_BLOCKS, NUM_LAYERS, 2, BLOCK_SIZE, kind.kv_heads, kind.head_dim)
        self.blocks = torch.full(shape, torch.nan, dtype=dtype)
        self.cache = KVCache(
            self, num_blocks=NUM_BLOCKS, num_layers=NUM_LAYERS, block_size=BLOCK_SIZE,
            num_kv_heads=kind.kv_heads, head_dim=kind.head_dim, dtype=dtype,
        )  # fmt: skip

    def view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return self.blocks


def make_weights(kind: Kind, dtype: torch.dtype) -> FusedWeights:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.2).to(dtype)

    def norm(width: int) -> torch.Tensor:
        return (1 + torch.randn(width, generator=generator) * 0.1).to(dtype)

    def projection(rows: int, width: int) -> Projection:
        return Projection(random(rows, width), random(rows) if kind.biased else None)

    layers = tuple(
        Layer(
            input_norm=norm(HIDDEN),
            qkv=projection((kind.heads + 2 * kind.kv_heads) * kind.head_dim, HIDDEN),
            query_norm=norm(kind.head_dim) if kind.head_norms else None,
            key_norm=norm(kind.head_dim) if kind.head_norms else None,
            output=projection(HIDDEN, kind.heads * kind.head_dim),
            post_norm=norm(HIDDEN),
            gate_up=projection(2 * INNER, HIDDEN),
            down=projection(HIDDEN, INNER),
        )
        for _ in range(NUM_LAYERS)
    )
    return FusedWeights(random(VOCAB, HIDDEN), layers, norm(HIDDEN), projection(VOCAB, HIDDEN))


class Pair:
    """One random model bound to torch and to the native decoder, each with a cache of its own."""

    def __init__(self, kind: Kind, dtype: torch.dtype) -> None:
        weights = make_weights(kind, dtype)
        facts = FusedSpec(NUM_LAYERS, kind.heads, kind.kv_heads, kind.head_dim, 1e-5, kind.head_dim**-0.5, 1.0)
        self.frequencies = 10000.0 ** (-torch.arange(0, kind.head_dim, 2) / kind.head_dim)
        self.dtype = dtype
        self.torch_arena, self.native_arena = _Arena(kind, dtype), _Arena(kind, dtype)
        self.fused = FusedDecoder(facts, weights, self.frequencies, kind.windows, native=False)
        self.native = native.NativeDecoder.create(decoder_spec(facts, weights, kind.windows, self.native_arena.blocks))

    def batch(self, *chunks: Chunk) -> PackedBatch:
        return PackedBatch.from_plan(StepPlan(chunks), block_size=BLOCK_SIZE)

    def by_native(self, batch: PackedBatch) -> torch.Tensor:
        angles = torch.outer(batch.positions.float(), self.frequencies).repeat(1, 2)
        return self.native.forward(
            batch.input_ids, angles.cos().to(self.dtype), angles.sin().to(self.dtype), batch.slots,
            batch.query_starts, batch.context_lengths, batch.block_tables, batch.logits_indices,
        )  # fmt: skip

    @torch.inference_mode()
    def by_torch(self, batch: PackedBatch) -> torch.Tensor:
        return self.fused.forward(batch, self.torch_arena.cache).float()


def tokens(count: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def mixed_steps() -> list[tuple[Chunk, ...]]:
    """A prompt in two chunks, another that shares its first blocks in the same step, then decodes of both.

    Last a long prompt, computed with many tokens at once, all of whose logits are wanted; beside a decode.
    """
    shared = (5, 60, 7)
    first, second = (*shared, 11, 2, 33), (*shared, 40, 41, 3)
    start, long = tokens(24, 1), tokens(150, 9)
    scoring = Scoring(0, long[1:], 0)
    return [
        (Chunk("a", start, 0, first, False), Chunk("b", tokens(9, 2), 24, second, True)),
        (Chunk("a", tokens(5, 3), 24, first, True), Chunk("b", tokens(1, 4), 33, second, True)),
        (Chunk("b", tokens(1, 5), 34, second, True), Chunk("a", tokens(1, 6), 29, first, True)),
        (Chunk("b", tokens(2, 7), 35, second, False),),
        (Chunk("b", tokens(1, 8), 37, second, True),),
        (
            Chunk("c", long, 0, tuple(range(42, 61)), True, scoring=scoring),
            Chunk("b", tokens(1, 10), 38, second, True),
        ),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(KINDS))
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_steps_equal_the_torch_loop(level, name, dtype, threads):
    """Logits and the caches' contents; NaN from a poisoned block anywhere would show."""
    native.set_num_threads(threads)
    pair = Pair(KINDS[name], dtype)
    for step in mixed_steps():
        batch = pair.batch(*step)
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
        results.append([pair.by_native(pair.batch(*step)) for step in mixed_steps()])
    for other in results[1:]:
        assert all(torch.equal(left, right) for left, right in zip(results[0], other, strict=True))


def test_callers_from_several_threads_take_turns(level):
    """Two decoders, and one decoder from two threads, at once: each answer as if alone."""
    native.set_num_threads(2)
    pairs = [Pair(KINDS["llama"], torch.float32), Pair(KINDS["qwen3"], torch.float32)]
    batches = [pair.batch(Chunk("a", tokens(20, 1), 0, (1, 2, 3), True)) for pair in pairs]
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
        pair.by_native(pair.batch(Chunk("a", settings["token_ids"], 0, settings["block_ids"], True)))


def test_refuses_other_dtypes():
    pair = Pair(KINDS["llama"], torch.float32)
    weights = make_weights(KINDS["llama"], torch.float16)
    facts = FusedSpec(NUM_LAYERS, 4, 2, 16, 1e-5, 0.25, 1.0)
    with pytest.raises(ValueError, match="float16"):
        native.NativeDecoder.create(decoder_spec(facts, weights, (None,) * NUM_LAYERS, pair.native_arena.blocks.half()))
