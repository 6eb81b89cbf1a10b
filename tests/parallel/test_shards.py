"""The split of a model: every number on exactly one rank, or whole on all that were said to have it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shuteye.errors import InvalidRequest, UnsupportedModel
from shuteye.parallel.shards import (
    EMBEDDING,
    HEAD,
    DecoderShape,
    RankPlace,
    ShardPlan,
    even_ranges,
    plan_shards,
    stage_layers,
)

SMOLLM2 = DecoderShape(
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    hidden_size=576,
    intermediate_size=1536,
    vocab_size=49152,
    tied=True,
)


def plans(shape: DecoderShape, tp_size: int = 1, pp_size: int = 1) -> list[ShardPlan]:
    return [plan_shards(shape, place) for place in RankPlace(0, tp_size, pp_size).all()]


def tensors(shape: DecoderShape) -> dict[str, tuple[int, ...]]:
    """Every tensor that a model of this shape may have, biases and norms included."""
    query, key, hidden = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim, shape.hidden_size
    rows = {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (shape.intermediate_size, hidden),
        "mlp.up_proj": (shape.intermediate_size, hidden),
        "mlp.down_proj": (hidden, shape.intermediate_size),
    }
    named: dict[str, tuple[int, ...]] = {EMBEDDING: (shape.vocab_size, hidden), "model.norm.weight": (hidden,)}
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}"
        named |= {f"{prefix}.{name}.weight": full for name, full in rows.items()}
        named |= {f"{prefix}.{name}.bias": full[:1] for name, full in rows.items()}
        named |= {f"{prefix}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        named |= {f"{prefix}.self_attn.{each}_norm.weight": (shape.head_dim,) for each in "qk"}
    if not shape.tied:
        named |= {HEAD: (shape.vocab_size, hidden), "lm_head.bias": (shape.vocab_size,)}
    return named


@st.composite
def layouts(draw: st.DrawFn) -> tuple[DecoderShape, int, int]:
    num_kv_heads = draw(st.integers(1, 6))
    shape = DecoderShape(
        num_layers=draw(st.integers(1, 7)),
        num_heads=num_kv_heads * draw(st.integers(1, 4)),
        num_kv_heads=num_kv_heads,
        head_dim=2 * draw(st.integers(1, 4)),
        hidden_size=draw(st.integers(1, 9)),
        intermediate_size=draw(st.integers(6, 300)),
        vocab_size=draw(st.integers(6, 400)),
        tied=draw(st.booleans()),
    )
    return shape, draw(st.integers(1, num_kv_heads)), draw(st.integers(1, shape.num_layers))


def is_replicated(name: str) -> bool:
    """Whole on every tensor parallel rank of the stages that have it."""
    return "norm" in name


@given(layouts())
def test_parts_of_all_ranks_are_the_whole_exactly_once(drawn: tuple[DecoderShape, int, int]) -> None:
    """Would catch a row on no rank, or a bias that is added by two."""
    shape, tp_size, pp_size = drawn
    ranks = plans(shape, tp_size, pp_size)
    for name, full in tensors(shape).items():
        covered = np.zeros(full, np.int64)
        for plan in ranks:
            part = plan.part_of(name, full)
            if part is not None:
                assert len(part) == len(full)
                assert covered[part].size > 0, f"{name}: an empty part is none"
                covered[part] += 1
        wanted = tp_size if is_replicated(name) else 1
        if name == EMBEDDING:
            wanted = tp_size + (shape.tied and pp_size > 1)  # the last stage's head is another copy
        assert (covered == wanted).all(), name


@given(layouts())
def test_query_heads_stay_with_their_kv_head(drawn: tuple[DecoderShape, int, int]) -> None:
    """Would catch a split by which a rank's queries read keys that lie elsewhere."""
    shape, tp_size, pp_size = drawn
    group = shape.num_heads // shape.num_kv_heads
    for plan in plans(shape, tp_size, pp_size):
        prefix = f"model.layers.{plan.spec.layers.start}.self_attn"
        heads = {}
        for name, count in (("q", shape.num_heads), ("k", shape.num_kv_heads), ("v", shape.num_kv_heads)):
            part = plan.part_of(f"{prefix}.{name}_proj.weight", (count * shape.head_dim, shape.hidden_size))
            assert part is not None
            heads[name] = [row // shape.head_dim for row in range(part[0].start, part[0].stop, shape.head_dim)]
        assert heads["k"] == heads["v"] == list(plan.spec.kv_groups)
        assert [head // group for head in heads["q"]] == [kv for kv in heads["k"] for _ in range(group)]
        assert plan.num_heads == len(heads["q"])
        columns = plan.part_of(f"{prefix}.o_proj.weight", (shape.hidden_size, shape.num_heads * shape.head_dim))
        assert columns is not None
        assert columns[1] == slice(heads["q"][0] * shape.head_dim, (heads["q"][-1] + 1) * shape.head_dim)


@given(layouts())
def test_kv_bytes_of_all_ranks_are_those_of_one(drawn: tuple[DecoderShape, int, int]) -> None:
    shape, tp_size, pp_size = drawn
    (alone,) = plans(shape)
    together = sum(plan.kv_bytes_per_token(itemsize=2) for plan in plans(shape, tp_size, pp_size))
    assert (
        together == alone.kv_bytes_per_token(itemsize=2) == 4 * shape.num_layers * shape.num_kv_heads * shape.head_dim
    )


@given(layouts())
def test_stages_are_all_layers_in_order(drawn: tuple[DecoderShape, int, int]) -> None:
    shape, tp_size, pp_size = drawn
    stages = stage_layers(shape, tp_size=tp_size, pp_size=pp_size)
    assert [layer for stage in stages for layer in stage] == list(range(shape.num_layers))
    assert all(stages)


@given(layouts())
def test_one_rank_samples_and_the_first_stage_embeds(drawn: tuple[DecoderShape, int, int]) -> None:
    shape, tp_size, pp_size = drawn
    ranks = plans(shape, tp_size, pp_size)
    assert [plan.spec.rank for plan in ranks if plan.holds_sampler] == [(pp_size - 1) * tp_size]
    assert [plan.spec.rank for plan in ranks if plan.embeds] == list(range(tp_size))
    assert [plan.spec.rank for plan in ranks if plan.has_head] == list(range(tp_size * (pp_size - 1), len(ranks)))


@given(st.integers(1, 500), st.integers(1, 9), st.sampled_from([1, 2, 32]))
def test_ranges_are_even_to_a_multiple(total: int, num_parts: int, multiple: int) -> None:
    if total < num_parts:
        return
    parts = even_ranges(total, num_parts, multiple=multiple)
    assert [each for part in parts for each in part] == list(range(total))
    assert all(parts)
    if total >= num_parts * multiple:
        assert all(part.start % multiple == 0 for part in parts)
        assert max(map(len, parts)) - min(map(len, parts)) < 2 * multiple


def test_smollm2_is_split_unevenly_by_kv_group() -> None:
    first, second = plans(SMOLLM2, 2)
    assert (first.spec.kv_groups, second.spec.kv_groups) == (range(2), range(2, 3))
    assert (first.num_heads, second.num_heads) == (6, 3)
    assert (first.intermediate, second.intermediate) == (range(768), range(768, 1536))
    assert [plan.kv_bytes_per_token(itemsize=2) for plan in (first, second)] == [15360, 7680]


def test_stages_are_balanced_by_bytes() -> None:
    """SmolLM2's embedding weighs as much as eight layers, on the first stage and, as the head, on the last."""
    assert [len(stage) for stage in stage_layers(SMOLLM2, tp_size=1, pp_size=3)] == [8, 15, 7]
    assert [len(stage) for stage in stage_layers(SMOLLM2, tp_size=1, pp_size=2)] == [15, 15]


def test_ranks_are_numbered_stage_by_stage() -> None:
    assert [place.label for place in RankPlace(0, 2, 2).all()] == [
        *("tp0of2.pp0of2", "tp1of2.pp0of2", "tp0of2.pp1of2", "tp1of2.pp1of2")
    ]
    assert RankPlace().label == ""


@pytest.mark.parametrize(
    ("tp_size", "pp_size", "param"),
    [(4, 1, "tensor_parallel_size"), (1, 31, "pipeline_parallel_size")],
)
def test_more_ranks_than_there_are_parts_are_refused(tp_size: int, pp_size: int, param: str) -> None:
    with pytest.raises(UnsupportedModel) as refusal:
        plan_shards(SMOLLM2, RankPlace(0, tp_size, pp_size))
    assert refusal.value.param == param
    assert f"at most {3 if tp_size > 1 else 30}" in refusal.value.message


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.30.mlp.up_proj.weight",
        "model.layers.0.mlp.router.weight",
        "lm_head.weights",
        "x.model.norm.weight",
    ],
)
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="not a tensor") as refusal:
        plans(SMOLLM2, 2)[0].part_of(name, (576,))
    assert refusal.value.param == name


def test_other_shapes_are_refused_also_on_ranks_that_hold_nothing_of_the_tensor() -> None:
    """Would catch an update that one rank takes and another refuses."""
    for plan in plans(SMOLLM2, 2, 2):
        with pytest.raises(InvalidRequest, match="expected"):
            plan.part_of("model.layers.0.self_attn.q_proj.weight", (288, 576))


def test_a_tied_head_is_the_embedding_by_another_name() -> None:
    for plan in plans(SMOLLM2, 2, 2):
        assert plan.part_of(HEAD, (49152, 576)) == plan.part_of(EMBEDDING, (49152, 576))
