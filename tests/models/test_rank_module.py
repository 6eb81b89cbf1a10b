"""Ranks of models that transformers' modules compute: what transformers' plans make of them, against one rank."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_models import LAYOUTS, NINE_ON_THREE, PROMPTS, Ranks, batches, greedy
from transformers import AutoConfig, Gemma3TextConfig, PhiConfig

from shuteye.errors import ImageFailure, InvalidRequest, UnsupportedModel
from shuteye.models.binding import Shard
from shuteye.models.module_split import divide
from shuteye.models.rank_module import RankModuleDecoder
from shuteye.models.support import check
from shuteye.models.tensors import slot_view
from shuteye.parallel.shards import RankPlace
from shuteye.tasks.generate.plans import Chunk
from shuteye.testing import tiny_model

EXPERTS: dict[str, Any] = {"moe_intermediate_size": 40, "num_experts": 4, "num_experts_per_tok": 2}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "gemma3_text": {  # tied; norms of heads; windows that differ from stage to stage; embeddings are scaled
        "sliding_window": 20,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi": {"tie_word_embeddings": False, "intermediate_size": 100},  # biases everywhere; attention beside MLP
    "starcoder2": {"sliding_window": 20},  # biases of sums
    "olmo2": {"tie_word_embeddings": False},  # norms over all heads: projections are put together again
    "gpt_neox": {"tie_word_embeddings": False},  # query, key and value of each head in one projection
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 24, "mlp_only_layers": [1]},
}
MORE_CHECKPOINTS: dict[str, dict[str, Any]] = {
    "apertus": {},  # layers have buffers that are stored
    "cohere": {"logit_scale": 0.5},
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "glm": {"attention_bias": True, "intermediate_size": 70},
}
SIZES: dict[str, Any] = {
    **NINE_ON_THREE,
    **EXPERTS,
    **{"num_hidden_layers": 3, "intermediate_size": 104, "attention_bias": True, "mlp_bias": True, "use_bias": True},
    **{"num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "moe_k": 2, "n_group": 1, "topk_group": 1},
    **{"shared_expert_intermediate_size": 36, "first_k_dense_replace": 1, "num_dense_layers": 1, "n_shared_experts": 1},
}
"""What configs of transformers call the sizes of models."""
ALL_DIVIDED = (
    *("afmoe", "apertus", "apertus1p5_text", "arcee", "cohere", "cohere2", "cohere2_moe", "cwm", "dots1"),
    *("ernie4_5", "ernie4_5_moe", "exaone", "exaone4", "exaone_moe", "flex_olmo", "gemma", "gemma3_text", "glm"),
    *("glm4", "glm4_moe", "gpt_neox", "gptj", "granite", "helium", "hy_v3", "hyperclovax", "internlm3"),
    *("iquestcoder", "jais2", "kolibri1", "laguna", "mellum", "minimax_m2", "minimax_m3_vl_text", "ministral"),
    *("ministral3", "mixtral", "olmo", "olmo2", "olmo3", "phi", "phi3", "qwen2_moe", "qwen3_moe", "sarvam_moe"),
    *("seed_oss", "smollm3", "solar_open", "starcoder2"),
)
"""Every type that one rank can serve, by transformers' modules, and that transformers plans in both ways."""
ODD_SIZES: dict[str, dict[str, Any]] = {
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4, "hidden_size": 64, "num_attention_heads": 8},
    "olmoe": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4},
}
NOT_STAGED = ("granitemoe", "granitemoeshared", "hunyuan_v1_moe", "nanochat", "nemotron", "olmoe", "phimoe")
"""Those that it plans for tensor parallelism alone."""
STAGED_ALONE = ("aria_text", "beam", "codegen")
"""Those whose plan for tensor parallelism is not understood."""


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """A tiny checkpoint of a type, made once."""

    @functools.cache
    def make(architecture):
        settings = NINE_ON_THREE | (CHECKPOINTS | MORE_CHECKPOINTS)[architecture]
        return tiny_model(tmp_path_factory.mktemp("ranks") / architecture, architecture=architecture, **settings)

    return make


@pytest.fixture(params=CHECKPOINTS)
def checkpoint(request, make):
    return make(request.param)


def cases(checkpoints, often):
    """Types on all layouts, of which the normal run has those that `often` says of (type, layout)."""
    return [
        pytest.param(
            architecture,
            RankPlace(0, *sizes),
            marks=() if often(architecture, name) else (pytest.mark.slow,),
            id=f"{architecture} {name}",
        )
        for architecture in checkpoints
        for name, sizes in LAYOUTS.items()
    ]


CASES = cases(
    CHECKPOINTS, lambda architecture, name: name == "TP 2 × PP 2" or (architecture == "gemma3_text" and name != "PP 3")
)
MORE_CASES = cases(
    MORE_CHECKPOINTS, lambda architecture, name: architecture in {"apertus", "granite"} and name == "PP 2"
)


def require_same(ranks: Ranks, alone, num_tokens=4):
    """Greedy tokens and logits as on one rank."""
    expected_tokens, expected = greedy(alone.logits, num_tokens)
    found_tokens, found = greedy(ranks.logits, num_tokens)
    assert found_tokens == expected_tokens
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    return found_tokens


@pytest.mark.parametrize(("architecture", "layout"), CASES)
def test_greedy_tokens_and_logits_are_those_of_one_rank_and_of_transformers(
    architecture, layout, make, load, load_ranks, reference
):
    """Would catch a part on the wrong rank, a bias added twice or never, a window of another stage's layer."""
    checkpoint = make(architecture)
    ranks = load_ranks(checkpoint, layout)
    assert all(isinstance(each.model.decoder, RankModuleDecoder) for each in ranks.drivers)
    found = require_same(ranks, load(checkpoint, num_blocks=16))
    model = reference.model(checkpoint, torch.float32)
    assert found == [reference.tokens(model, prompt, 4) for prompt in PROMPTS]


@pytest.mark.parametrize(("architecture", "layout"), MORE_CASES)
def test_more_types_give_what_one_rank_gives(architecture, layout, make, load, load_ranks):
    """Would catch what is multiplied or added between embedding, layers and head, and would be done on each stage."""
    require_same(load_ranks(make(architecture), layout), load(make(architecture), num_blocks=16))


def test_hidden_states_are_bit_identical_across_the_ranks_of_a_stage(checkpoint, load_ranks):
    """Would catch what is added on one rank alone; in bfloat16 also a sum rounded twice."""
    ranks = load_ranks(checkpoint, RankPlace(0, 2, 2), dtype="bfloat16")
    (batch,) = batches([[Chunk("0", tuple(PROMPTS[0]), 0, (3, 1, 5), True)]])
    first, second, *_ = ranks.forward(batch)
    assert np.array_equal(first, second)
    for stage in (ranks.groups[:2], ranks.groups[2:]):
        first, second = (each.tensor.sums for each in stage)
        assert len(first) == len(second) > 0
        assert all(np.array_equal(left, right) for left, right in zip(first, second, strict=True))


def test_every_rank_gives_finite_numbers_for_the_canary(checkpoint, load_ranks):
    """Would catch memory of another stage that is read without ever being written."""
    ranks = load_ranks(checkpoint, RankPlace(0, 2, 2))
    (batch,) = batches([[Chunk("0", (5, 6, 7), 0, (3,), True)]])
    first, again = ranks.forward(batch), ranks.forward(batch)
    widths = [len(part) for part in ranks.plans[0].vocabularies]
    assert [tuple(each.shape) for each in first] == [(3, 72), (3, 72), (1, 321), (1, widths[1])]
    for left, right in zip(first, again, strict=True):
        assert torch.isfinite(left).all()
        assert torch.equal(left, right)


# --- images ---------------------------------------------------------------------------------------


def test_images_hold_the_parts_of_the_plan_and_nothing_else(checkpoint, load, load_ranks):
    whole, ranks = load(checkpoint), load_ranks(checkpoint, RankPlace(0, 2, 2))
    expected = {name: slot_view(whole.weights, slot) for name, slot in whole.image.layout.slots.items()}
    for driver, plan in zip(ranks.drivers, ranks.plans, strict=True):
        found = {name: slot_view(driver.weights, slot) for name, slot in driver.image.layout.slots.items()}
        parts = {name: plan.part_of(name, tensor.shape) for name, tensor in expected.items()}
        assert found.keys() == {name for name, part in parts.items() if part is not None}
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name][parts[name]]), name
        assert Shard.of(driver.image).place.label == driver.image.identity.shard


def test_a_written_part_is_seen_as_the_whole_tensor_is(checkpoint, load, load_ranks):
    """What an update does: each rank takes its part of the unsharded tensor; also experts' halves and tied rows."""
    alone, ranks = load(checkpoint, num_blocks=16), load_ranks(checkpoint, RankPlace(0, 2, 2))
    generator = torch.Generator().manual_seed(1)
    for name, slot in alone.image.layout.slots.items():
        tensor = torch.randn(slot.shape, generator=generator) * 0.2
        slot_view(alone.weights, slot).copy_(tensor)
        for driver, plan in zip(ranks.drivers, ranks.plans, strict=True):
            part = plan.part_of(name, tensor.shape)
            if part is not None:
                slot_name = driver.model.slot_names[name]
                slot_view(driver.weights, driver.image.layout.slots[slot_name]).copy_(tensor[part])
    require_same(ranks, alone)


def test_attention_that_is_put_together_again_is_cached_whole(make, load_ranks):
    """KV cache is divided only where heads are."""
    split, whole = (load_ranks(make(each), RankPlace(0, 2, 1)).drivers for each in ("gemma3_text", "olmo2"))
    assert [each.model.facts.attention.num_kv_heads for each in split] == [2, 1]
    assert [each.model.facts.attention.num_kv_heads for each in whole] == [3, 3]


def test_an_image_of_an_older_transformers_is_used_while_models_are_divided_so(
    make, load_ranks, load, image_store, tmp_path, monkeypatch
):
    """Would catch parts read by a plan that they were not cut by."""
    checkpoint, layout = make("phi"), RankPlace(0, 2, 1)
    before = load(checkpoint, num_blocks=16)
    load_ranks(checkpoint, layout)
    monkeypatch.setattr("transformers.__version__", "99.0")
    require_same(load_ranks(checkpoint, layout), before)
    monkeypatch.setattr(PhiConfig, "base_model_tp_plan", {"layers.*.mlp.fc1": "colwise", "layers.*.mlp.fc2": "rowwise"})
    with pytest.raises(ImageFailure, match=r"99\.0 divides models of type 'phi' among ranks in another way"):
        load_ranks(checkpoint, layout)


# --- what is refused ------------------------------------------------------------------------------


def settings_of(architecture, **more):
    """Sizes, as far as its config has them."""
    config = AutoConfig.for_model(architecture)
    known = {*config.to_dict(), *config.attribute_map}
    return {name: each for name, each in (SIZES | more).items() if name in known}


def config_of(architecture, **more):
    return AutoConfig.for_model(architecture, **settings_of(architecture, **more))


def refusal(config, tp_size=2, pp_size=1):
    with pytest.raises(UnsupportedModel) as refused:
        divide(config, check(config), RankPlace(0, tp_size, pp_size))
    return refused.value


@pytest.mark.parametrize(
    ("architecture", "layout", "said"),
    [
        ("gpt2", (2, 1), "transformers has no `tp_plan`"),
        ("gpt2", (1, 2), "transformers has no `pp_plan`"),
        ("opt", (2, 1), "transformers has no `tp_plan`"),
        ("codegen", (2, 1), "which belong to which of 8 KV heads"),
        ("nanochat", (1, 2), "transformers has no `pp_plan`"),
        ("hunyuan_v1_dense", (2, 1), "divides nothing in its layers"),
        ("beam", (2, 1), "'local_params' for model.layers.0.self_attn"),
        ("aria_text", (2, 1), "'packed_rowwise' for model.layers.0.mlp.experts.gate_up_proj"),
        ("gemma3_text", (4, 1), "3 KV heads"),
        ("gemma3_text", (1, 4), "3 layers"),
    ],
)
def test_what_transformers_does_not_plan_or_is_not_known_here_is_refused_by_name(architecture, layout, said):
    refused = refusal(config_of(architecture, **ODD_SIZES.get(architecture, {})), *layout)
    assert isinstance(refused, InvalidRequest)
    assert said in refused.message
    assert refused.param == ("tensor_parallel_size" if layout[0] > 1 else "pipeline_parallel_size")
    if said not in ("3 KV heads", "3 layers"):
        assert repr(architecture) in refused.message


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"layers.*.self_attn.q_proj": "diagonal"}, "'diagonal' for model.layers.0.self_attn.q_proj"),
        ({"layers.*.mlp.act_fn": "colwise"}, "'colwise' for model.layers.0.mlp.act_fn, which is a"),
        ({"layers.*.mlp.gate_proj": "colwise"}, "only one side of model.layers.0.mlp"),
        ({"layers.*.mlp.down_proj": "rowwise"}, "only one side of model.layers.0.mlp"),
        ({"layers.*.self_attn.o_proj": "rowwise", "layers.*.self_attn.q_proj": "colwise"}, "expected {0: (2, 8)"),
        ({"layers.*.input_layernorm.weight": "colwise"}, "for model.layers.0.input_layernorm.weight (72,)"),
    ],
)
def test_plans_that_make_no_sense_are_refused(plan, said, monkeypatch):
    """Would catch a model that is divided by half of a plan, which gives numbers, but others."""
    monkeypatch.setattr(Gemma3TextConfig, "base_model_tp_plan", plan)
    assert said in refusal(config_of("gemma3_text")).message


def test_a_norm_over_heads_that_are_elsewhere_is_refused(monkeypatch):
    """Cohere's norms of queries have a row for each head, which its plan does not mention."""
    assert "could not be examined" in refusal(config_of("cohere", use_qk_norm=True)).message


def test_what_is_on_no_stage_is_refused(monkeypatch):
    """Would catch a norm that the last stage does without."""
    plan = {name: each for name, each in Gemma3TextConfig.base_model_pp_plan.items() if name != "norm"}
    monkeypatch.setattr(Gemma3TextConfig, "base_model_pp_plan", plan)
    assert "on which stage model.norm.weight is" in refusal(config_of("gemma3_text"), 1, 2).message


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ALL_DIVIDED + NOT_STAGED + STAGED_ALONE)
def test_every_type_that_transformers_plans_gives_what_one_rank_gives(architecture, load, load_ranks, tmp_path):
    """Would catch a plan that is understood in another way than it is meant."""
    more = ODD_SIZES.get(architecture, {})
    settings = settings_of(architecture, sliding_window=20, **more) | {"num_layers": 3}
    checkpoint = tiny_model(tmp_path / architecture, architecture=architecture, **settings)
    alone = load(checkpoint, num_blocks=16, modules=True)
    layouts = {(2, 1), (3, 1)} if architecture in NOT_STAGED else {(1, 2)}
    layouts |= {(2, 1), (3, 1), (2, 2)} if architecture in ALL_DIVIDED else set()
    for layout in sorted(layouts):
        require_same(load_ranks(checkpoint, RankPlace(0, *layout)), alone)


def test_the_types_that_are_documented_are_those_that_are_shown():
    """Would catch a promise that nothing keeps."""
    page = (Path(__file__).parents[2] / "docs" / "concepts.md").read_text(encoding="utf-8")
    both, tensor_alone, pipeline_alone = re.search(r"<!-- types.*?-->\n- (.*?)<!-- end", page, re.DOTALL)[1].split(
        "\n- "
    )
    assert re.findall(r"`(\w+)`", both) == sorted(ALL_DIVIDED)
    assert re.findall(r"`(\w+)`", tensor_alone) == sorted(NOT_STAGED)
    assert re.findall(r"`(\w+)`", pipeline_alone) == sorted(STAGED_ALONE)
