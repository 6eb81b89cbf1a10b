"""Native steps of a model's parts against the same parts in torch; ranks are threads that add up in shared memory."""

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from random_decoders import (
    HIDDEN,
    INNER,
    KINDS,
    NUM_BLOCKS,
    NUM_LAYERS,
    VOCAB,
    CacheArena,
    Kind,
    Layer,
    Projection,
    Weights,
    facts_of,
    flat,
    frequencies_of,
    make_weights,
    mixed_steps,
    pack,
    tokens,
)
from thread_group import on_all_ranks

from shuteye import native
from shuteye.errors import GroupAborted
from shuteye.models.fused import FusedDecoder
from shuteye.models.rank_decoder import RankDecoder
from shuteye.models.rank_groups import RankGroups
from shuteye.parallel.group import ShmGroup, ShmRegion
from shuteye.parallel.shards import DecoderShape, RankPlace, ShardPlan, plan_shards
from shuteye.tasks.generate.plans import Chunk
from shuteye.tasks.generate.runner import PackedBatch

SLOT_BYTES = 16 << 10
"""The parts of the longest of the steps do not fit."""

CASES = {  # 9 query heads on 3 KV heads, 2 + 1; biases that one rank has; norms of heads; windows that stages differ in
    "smollm, TP 2": ("smollm", (2, 1)),
    "smollm, TP 3": ("smollm", (3, 1)),
    "biased, TP 2": (Kind(6, 3, 16, biased=True), (2, 1)),
    "qwen3, TP 2 × PP 2": ("qwen3", (2, 2)),
    "mistral, PP 3": ("mistral", (1, 3)),
}


def cut(plan: ShardPlan, name: str, tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The rank's part of a checkpoint's tensor."""
    part = None if tensor is None else plan.part_of(name, tensor.shape)
    return None if tensor is None or part is None else tensor[part].contiguous()


def cut_projection(plan: ShardPlan, names: dict[str, int], whole: Projection) -> Projection:
    """The rank's part of several projections that lie side by side, by name and rows."""

    def part(leaf: str, tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        pieces = zip(names, tensor.split(list(names.values())), strict=True)
        found = [cut(plan, f"{name}.{leaf}", piece) for name, piece in pieces]
        return None if None in [one if one is None else 0 for one in found] else torch.cat(found)

    weight = part("weight", whole.weight)
    assert weight is not None
    return Projection(weight, part("bias", whole.bias))


def part_of_layer(plan: ShardPlan, index: int, kind: Kind, layer: Layer) -> Layer:
    prefix, keys = f"model.layers.{index}", kind.kv_heads * kind.head_dim
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    rows = {f"{attention}.q_proj": kind.heads * kind.head_dim, f"{attention}.k_proj": keys, f"{attention}.v_proj": keys}
    return Layer(
        input_norm=layer.input_norm,
        qkv=cut_projection(plan, rows, layer.qkv),
        query_norm=layer.query_norm,
        key_norm=layer.key_norm,
        output=cut_projection(plan, {f"{attention}.o_proj": HIDDEN}, layer.output),
        post_norm=layer.post_norm,
        gate_up=cut_projection(plan, {f"{mlp}.gate_proj": INNER, f"{mlp}.up_proj": INNER}, layer.gate_up),
        down=cut_projection(plan, {f"{mlp}.down_proj": HIDDEN}, layer.down),
    )


def part_of(plan: ShardPlan, kind: Kind, whole: Weights) -> Weights:
    return Weights(
        embedding=whole.embedding if plan.embeds else None,
        layers=tuple(part_of_layer(plan, index, kind, whole.layers[index]) for index in plan.spec.layers),
        norm=whole.norm if plan.has_head else None,
        head=cut_projection(plan, {"lm_head": VOCAB}, whole.head) if plan.has_head and whole.head else None,
    )


class Ranks:
    """A random model over several ranks, each with a cache of its own; stepped together."""

    def __init__(self, kind: Kind, dtype: torch.dtype, layout: tuple[int, int], *, native: bool) -> None:
        self.places = RankPlace(0, *layout).all()
        self.plans = [plan_shards(shape_of(kind), place) for place in self.places]
        self.regions: list[ShmRegion] = []
        self._opened: list[ShmGroup] = []
        self._kept: list[Weights] = []  # matrices point into them
        tensor = [self.groups_of(layout[0]) for _ in range(layout[1])]
        pipeline = [self.groups_of(layout[1]) for _ in range(layout[0])]
        whole = make_weights(kind, dtype)
        self.groups = [
            RankGroups(tensor[place.pp_rank][place.tp_rank], pipeline[place.tp_rank][place.pp_rank])
            for place in self.places
        ]
        self.arenas, self.decoders = [], []
        for plan, groups in zip(self.plans, self.groups, strict=True):
            part = Kind(plan.num_heads, len(plan.spec.kv_groups), kind.head_dim)
            num_layers = len(plan.spec.layers)
            self.arenas.append(CacheArena(part, dtype, num_layers=num_layers))
            facts = facts_of(part, num_layers=num_layers)
            windows = [kind.windows[index] for index in plan.spec.layers]
            self._kept.append(part_of(plan, kind, whole))
            weights = flat(part, self._kept[-1], windows)
            frequencies = frequencies_of(kind)
            self.decoders.append(RankDecoder(plan, facts, weights, frequencies, windows, groups=groups, native=native))

    def groups_of(self, size: int) -> list[ShmGroup | None]:
        if size == 1:
            return [None]
        region = ShmRegion(size, epoch=1, slot_bytes=SLOT_BYTES)
        self.regions.append(region)
        groups = [ShmGroup(region.fd, rank, size, epoch=1, timeout_s=20) for rank in range(size)]
        self._opened += groups
        return [*groups]

    def calls(self, batch: PackedBatch) -> list[Callable[[], torch.Tensor]]:
        """One for each rank."""

        def forward(index: int) -> torch.Tensor:
            return torch.from_numpy(self.decoders[index].forward(batch, self.arenas[index].cache))

        return [lambda index=index: forward(index) for index in range(len(self.decoders))]

    def forward(self, batch: PackedBatch) -> list[torch.Tensor]:
        return on_all_ranks(self.calls(batch))

    def close(self) -> None:
        for group in self._opened:
            group.close()
        for region in self.regions:
            region.close()


def shape_of(kind: Kind) -> DecoderShape:
    return DecoderShape(NUM_LAYERS, kind.heads, kind.kv_heads, kind.head_dim, HIDDEN, INNER, VOCAB, tied=False)


@pytest.fixture
def make_ranks(level):
    made: list[Ranks] = []

    def make(kind: Kind | str, dtype: torch.dtype, layout: tuple[int, int], *, native: bool = True) -> Ranks:
        made.append(Ranks(KINDS[kind] if isinstance(kind, str) else kind, dtype, layout, native=native))
        return made[-1]

    yield make
    for ranks in made:
        ranks.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("threads", [1, 3])
def test_parts_equal_the_torch_loop_of_the_same_parts(make_ranks, case, dtype, threads):
    """Logits, hidden states between stages, and the caches' contents."""
    native.set_num_threads(threads)
    by_native, by_torch = (make_ranks(*CASES[case][:1], dtype, CASES[case][1], native=which) for which in (True, False))
    assert all(each.native_tokens for each in by_native.decoders)
    for step in mixed_steps():
        batch = pack(*step)
        all_expected = by_torch.forward(batch)
        # Of all ranks: one may have three columns of the logits, all small.
        largest = max((float(each.abs().max()) for each in all_expected if each.numel()), default=0.0)
        for found, expected in zip(by_native.forward(batch), all_expected, strict=True):
            assert found.shape == expected.shape
            tolerance = 2e-5 if dtype == torch.float32 else 0.04
            torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * largest)
    for mine, others in zip(by_native.arenas, by_torch.arenas, strict=True):
        assert torch.equal(mine.written, others.written)


@pytest.mark.parametrize("case", CASES)
def test_parts_say_what_the_whole_says(make_ranks, case):
    """Would catch what native and torch parts get wrong alike; in float32, where roundings do not decide."""
    name, layout = CASES[case]
    kind = KINDS[name] if isinstance(name, str) else name
    ranks = make_ranks(kind, torch.float32, layout)
    weights = make_weights(kind, torch.float32)
    flat_weights = flat(kind, weights, kind.windows)
    whole = FusedDecoder(facts_of(kind), flat_weights, frequencies_of(kind), kind.windows)
    arena = CacheArena(kind, torch.float32)
    cache = arena.cache
    sampler = next(index for index, plan in enumerate(ranks.plans) if plan.holds_sampler)
    for step in mixed_steps():
        found = ranks.forward(pack(*step))[sampler]
        expected = torch.from_numpy(whole.forward(pack(*step), cache))
        assert torch.equal(found.argmax(-1), expected.argmax(-1))
        if expected.numel():
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_are_the_same_bits_on_all_ranks_of_a_stage(make_ranks, dtype):
    """And whoever computed which rows of them."""
    results = []
    for threads in (1, 2, 4):
        native.set_num_threads(threads)
        ranks = make_ranks(Kind(6, 3, 16, biased=True), dtype, (3, 2))
        for step in mixed_steps():
            found = ranks.forward(pack(*step))[:3]
            assert torch.equal(found[0], found[1])
            assert torch.equal(found[0], found[2])
            results.append(found[0])
    steps = len(mixed_steps())
    for number, found in enumerate(results):
        assert torch.equal(found, results[number % steps])


# --- when ranks do not come ------------------------------------------------------------------------

ONE = (Chunk("a", tokens(20, 1), 0, (1, 2, 3), True),)


def test_a_step_ends_when_the_group_is_aborted(make_ranks):
    """Waits must not outlast it, nor may a later step write where others still read."""
    ranks = make_ranks("smollm", torch.float32, (2, 1))
    errors: list[Any] = []

    def step(seed: int) -> None:
        try:
            ranks.calls(pack(Chunk("a", tokens(20, seed), 0, (1, 2, 3), True)))[0]()
        except GroupAborted as error:
            errors.append(error)

    waiting = threading.Thread(target=step, args=(1,))
    waiting.start()
    threading.Event().wait(0.05)
    ranks.groups[1].tensor.abort("the test says so")
    waiting.join(timeout=10)
    assert not waiting.is_alive()
    (region,) = ranks.regions
    before = os.pread(region.fd, os.fstat(region.fd).st_size, 0)
    step(2)
    assert os.pread(region.fd, len(before), 0) == before
    assert [error.by for error in errors] == [1, 1]
    assert all("the test says so" in str(error) for error in errors)


@pytest.mark.parametrize("num_tokens", [20, 150], ids=["in the slot", "in pieces"])
def test_a_rank_that_does_not_come_is_named(make_ranks, num_tokens):
    ranks = make_ranks("smollm", torch.float32, (2, 1))
    ranks.groups[0].tensor.timeout_s = 0.1
    batch = pack(Chunk("a", tokens(num_tokens, 1), 0, tuple(range(1, 20)), True))
    with pytest.raises(GroupAborted) as error:
        ranks.calls(batch)[0]()
    assert error.value.missing == (1,)


def test_ranks_in_different_steps_add_nothing_up(make_ranks):
    """Their parts have different shapes: a sum of both would be a wrong answer."""
    ranks = make_ranks("smollm", torch.float32, (2, 1))
    calls = ranks.calls(pack(*ONE))[0], ranks.calls(pack(Chunk("a", (1,), 0, (1,), True)))[1]

    def outcome(call: Callable[[], torch.Tensor]) -> str:
        with pytest.raises(GroupAborted, match="different calls"):
            call()
        return "aborted"

    assert on_all_ranks([lambda call=call: outcome(call) for call in calls]) == ["aborted", "aborted"]


def test_ranks_go_on_in_a_new_group(make_ranks):
    """Would catch a decoder that keeps the old one, or anything of the step that was aborted."""
    ranks = make_ranks("smollm", torch.float32, (2, 1))
    expected = ranks.forward(pack(*ONE))
    ranks.groups[1].tensor.abort("the test says so")
    for call in ranks.calls(pack(Chunk("b", tokens(9, 2), 0, (7, 8), True))):
        with pytest.raises(GroupAborted):
            call()
    for decoder, group in zip(ranks.decoders, ranks.groups_of(2), strict=True):
        decoder._groups = RankGroups(tensor=group)
    found = ranks.forward(pack(*ONE))
    assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))


def test_a_step_that_is_refused_leaves_the_group_as_it_was(make_ranks):
    ranks = make_ranks("smollm", torch.float32, (2, 1))
    expected = ranks.forward(pack(*ONE))
    for call in ranks.calls(pack(Chunk("a", (1,), 0, (NUM_BLOCKS,), True))):
        with pytest.raises(ValueError, match="slot is not in the cache"):
            call()
    found = ranks.forward(pack(*ONE))
    assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))
