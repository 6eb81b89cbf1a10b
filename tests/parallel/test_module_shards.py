"""Cuts of named tensors: every number on exactly one rank, or whole on all that were said to have it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from shuteye.errors import InvalidRequest, UnsupportedModel
from shuteye.parallel.module_shards import ModulePlan, ModuleSplit, TensorSplit, plan_modules
from shuteye.parallel.shards import RankPlace, part_shape

LAYOUTS = [(2, 1), (3, 1), (1, 2), (3, 2), (2, 3)]


def layer(index: int) -> dict[str, TensorSplit]:
    """Five KV groups of two heads of four; experts whose halves are cut alike; a bias that is added once."""
    whole: dict[str, Any] = {"layer": index}
    named = {
        "q.weight": TensorSplit((40, 12), dimension=0, multiple=8, **whole),
        "k.weight": TensorSplit((20, 12), dimension=0, multiple=4, **whole),
        "o.weight": TensorSplit((12, 40), dimension=1, multiple=8, **whole),
        "o.bias": TensorSplit((12,), once=True, **whole),
        "experts.gate_up": TensorSplit((3, 140, 12), dimension=1, times=2, **whole),
        "experts.down": TensorSplit((3, 12, 70), dimension=2, **whole),
        "norm.weight": TensorSplit((12,), **whole),
    }
    return {f"model.layers.{index}.{name}": each for name, each in named.items()}


def make_split(*, tied: bool = False) -> ModuleSplit:
    tensors = {
        "model.embed.weight": TensorSplit((99, 12)),
        **layer(0),
        **layer(1),
        **layer(2),
        "model.norm.weight": TensorSplit((12,), last=True),
        "lm_head.weight": TensorSplit((99, 12), last=True, dimension=0),
    }
    return ModuleSplit(
        num_layers=3,
        num_kv_heads=5,
        attention=True,
        hidden_size=12,
        vocab_size=99,
        layers="model.layers",
        layer_numel=9000,
        embedding="model.embed.weight",
        head="lm_head.weight",
        tied=tied,
        after=("model.norm",),
        tensors=tensors,
        exchanges={"model.layers.0.o": "sum"},
    )


def plans(split: ModuleSplit, tp_size: int, pp_size: int) -> list[ModulePlan]:
    return [plan_modules(split, place) for place in RankPlace(0, tp_size, pp_size).all()]


@pytest.mark.parametrize(("tp_size", "pp_size"), LAYOUTS)
@pytest.mark.parametrize("tied", [False, True])
def test_parts_of_all_ranks_are_the_whole_exactly_once(tp_size: int, pp_size: int, tied: bool) -> None:
    """Would catch a row on no rank, halves cut in different places, or a bias that is added by two."""
    split = make_split(tied=tied)
    for name, tensor in split.tensors.items():
        covered = np.zeros(tensor.shape, np.int64)
        for plan in plans(split, tp_size, pp_size):
            part = plan.part_of(name, tensor.shape)
            if part is not None:
                assert covered[part].shape == part_shape(part, tensor.shape)
                covered[part] += 1
        is_embedding = name == split.embedding or (name == split.head and tied)
        wanted = tp_size if "norm" in name or is_embedding else 1
        assert (covered == wanted + (is_embedding and tied and pp_size > 1)).all(), name


@pytest.mark.parametrize("tp_size", [2, 3, 5])
def test_what_is_multiplied_is_cut_in_the_same_places(tp_size: int) -> None:
    """Would catch queries that meet another rank's keys, and halves of experts that are not each other's."""
    for plan in plans(make_split(), tp_size, 1):
        parts = {name: plan.part_of(f"model.layers.1.{name}", each.shape) for name, each in _named().items()}
        groups = [*plan.spec.kv_groups]
        assert _indices(parts["q.weight"], 0) == [8 * group + row for group in groups for row in range(8)]
        assert _indices(parts["k.weight"], 0) == [4 * group + row for group in groups for row in range(4)]
        assert _indices(parts["o.weight"], 1) == _indices(parts["q.weight"], 0)
        down = _indices(parts["experts.down"], 2)
        assert _indices(parts["experts.gate_up"], 1) == down + [70 + row for row in down]


def _named() -> dict[str, TensorSplit]:
    return {name.removeprefix("model.layers.1."): each for name, each in layer(1).items()}


def _indices(part: Any, dimension: int) -> list[int]:
    return np.arange(200)[part[dimension]].tolist()


def test_layers_of_other_stages_are_told_by_name() -> None:
    first, last = plans(make_split(), 1, 2)
    assert [*first.spec.layers, *last.spec.layers] == [0, 1, 2]
    for plan, other in ((first, last), (last, first)):
        assert all(plan.has_module(f"model.layers.{index}.act.beta") for index in plan.spec.layers)
        assert not any(plan.has_module(f"model.layers.{index}") for index in other.spec.layers)
        assert plan.has_module("model.rotary_emb.inv_freq")


def test_unknown_names_and_other_shapes_are_refused_by_every_rank() -> None:
    for plan in plans(make_split(), 2, 2):
        with pytest.raises(InvalidRequest, match="is not a tensor of this model"):
            plan.part_of("model.layers.3.q.weight", (40, 12))
        with pytest.raises(InvalidRequest, match=r"has shape \(40, 13\), expected \(40, 12\)"):
            plan.part_of("model.layers.0.q.weight", (40, 13))


@pytest.mark.parametrize(
    ("layout", "attention", "said"),
    [
        ((6, 1), True, "5 KV heads"),
        ((21, 1), False, "20 rows or columns in model.layers.0.k.weight"),
        ((1, 4), True, "3 layers"),
    ],
)
def test_more_ranks_than_parts_are_refused(layout: tuple[int, int], attention: bool, said: str) -> None:
    with pytest.raises(UnsupportedModel, match=said):
        plan_modules(replace(make_split(), attention=attention), RankPlace(0, *layout))


def test_attention_that_is_not_split_has_all_kv_heads_on_every_rank() -> None:
    split = replace(make_split(), attention=False)
    assert [plan.spec.kv_groups for plan in plans(split, 2, 1)] == [range(5), range(5)]
