"""A model over several ranks computes what it computes on one: the parts, the images, and what ranks exchange."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from rank_models import BLOCK_SIZE, LAYOUTS, NINE_ON_THREE, PROMPTS, batches, greedy
from thread_group import on_all_ranks

from shuteye.errors import InvalidRequest, UnsupportedModel
from shuteye.models import converter
from shuteye.models.binding import Shard
from shuteye.models.converter import Order
from shuteye.models.image_builder import open_image
from shuteye.models.progress import no_progress
from shuteye.models.rank_decoder import RankDecoder
from shuteye.models.sources import resolve_source
from shuteye.models.tensors import slot_view
from shuteye.parallel.shards import EMBEDDING, RankPlace
from shuteye.tasks.generate.plans import Chunk
from shuteye.testing import tiny_encoder, tiny_model, tiny_speech_model

really_apart = converter.make_apart
"""What the suite replaces by a conversion in its own process."""

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "llama-tied": {},
    "llama-untied-biased": {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True, "head_dim": 16},
    "qwen2-biased": {"head_dim": 6},  # of which a rank's bias is no whole cache line
    "qwen3-normed": {  # and windows that differ from stage to stage
        **{"tie_word_embeddings": False},
        **{"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    },
    "mistral-window": {"sliding_window": 20},
}


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("ranks") / request.param
    settings = NINE_ON_THREE | CHECKPOINTS[request.param]
    return tiny_model(directory, architecture=request.param.split("-")[0], **settings)


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS)
def layout(request):
    return RankPlace(0, *request.param)


def test_greedy_tokens_and_logits_are_those_of_one_rank(checkpoint, layout, load, load_ranks):
    """Would catch a part on the wrong rank, a bias added twice or never, a head's columns out of order."""
    alone = load(checkpoint, native=False)
    ranks = load_ranks(checkpoint, layout)
    assert all(isinstance(each.model.decoder, RankDecoder) for each in ranks.drivers)
    expected_tokens, expected = greedy(alone.logits, 6)
    found_tokens, found = greedy(ranks.logits, 6)
    assert found_tokens == expected_tokens
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_tokens_are_those_of_transformers(checkpoint, load_ranks, reference):
    """One rank's loop and the ranks' share code: would catch what both get wrong."""
    ranks = load_ranks(checkpoint, RankPlace(0, 2, 2))
    found, _ = greedy(ranks.logits, 4)
    model = reference.model(checkpoint, torch.float32)
    assert found == [reference.tokens(model, prompt, 4) for prompt in PROMPTS]


@pytest.mark.model
@pytest.mark.slow
def test_smollm2_over_several_ranks_says_what_transformers_says(smollm2, smollm2_reference, layout, load_ranks):
    """Nine query heads on three KV heads: would catch a split that only even sizes survive."""
    prompts = [list(range(100, 137)), [504, 3575, 282, 4649, 314], [1]]
    ranks = load_ranks(smollm2, layout, dtype="float32")
    found, _ = greedy(ranks.logits, 12, prompts=prompts)
    model = smollm2_reference(torch.float32)
    with torch.inference_mode():
        for prompt, tokens in zip(prompts, found, strict=True):
            logits = model(torch.tensor([prompt + tokens])).logits[0]
            assert logits.argmax(-1)[len(prompt) - 1 : -1].tolist() == tokens


def test_hidden_states_are_bit_identical_across_the_ranks_of_a_stage(checkpoint, load_ranks):
    """Would catch a bias or residual that is added on one rank alone; in bfloat16 also a sum rounded twice."""
    ranks = load_ranks(checkpoint, RankPlace(0, 2, 2), dtype="bfloat16")
    (batch,) = batches([[Chunk("0", tuple(PROMPTS[0]), 0, (3, 1, 5), True)]])
    first, second, *_ = ranks.forward(batch)
    assert np.array_equal(first, second)
    for stage in (ranks.groups[:2], ranks.groups[2:]):
        first, second = (each.tensor.sums for each in stage)
        assert len(first) == len(second) > 0
        assert all(np.array_equal(left, right) for left, right in zip(first, second, strict=True))


def test_bfloat16_logits_are_as_true_as_one_ranks(checkpoint, load, load_ranks):
    ranks = load_ranks(checkpoint, RankPlace(0, 3, 1), dtype="bfloat16")
    rounded, exact = load(checkpoint, dtype="bfloat16", native=False), load(checkpoint, native=False)
    for name, slot in exact.image.layout.slots.items():
        slot_view(exact.weights, slot).copy_(slot_view(rounded.weights, rounded.image.layout.slots[name]))
    (batch,) = batches([[Chunk("0", tuple(PROMPTS[0]), 0, (3, 1, 5), True)]])
    truth = exact.logits(batch)
    errors = [(each - truth).norm() for each in (ranks.logits(batch), rounded.logits(batch))]
    assert errors[0] <= 2 * errors[1]


def test_every_rank_gives_finite_numbers_for_the_canary(checkpoint, load_ranks):
    """Ranks without the sampler give what they computed of it, which a canary can compare from wake to wake."""
    ranks = load_ranks(checkpoint, RankPlace(0, 2, 2))
    (batch,) = batches([[Chunk("0", (5, 6, 7), 0, (3,), True)]])
    first, again = ranks.forward(batch), ranks.forward(batch)
    widths = [len(part) for part in ranks.plans[0].vocabularies]
    assert [tuple(each.shape) for each in first] == [(3, 72), (3, 72), (1, 321), (1, widths[1])]
    for left, right in zip(first, again, strict=True):
        assert torch.isfinite(left).all()
        assert torch.equal(left, right)


def test_a_rank_without_kernels_says_so(checkpoint, load_ranks, caplog):
    with caplog.at_level(logging.INFO, logger="shuteye.models.decoder"):
        ranks = load_ranks(checkpoint, RankPlace(0, 2, 1), native=True)
    assert [each.model.decoder.native_tokens for each in ranks.drivers] == [0, 0]
    assert [record.message for record in caplog.records] == [
        "Each of 2 ranks computes with torch, not with the native kernels."
    ]


# --- images ---------------------------------------------------------------------------------------


def test_images_hold_the_parts_of_the_plan_and_nothing_else(checkpoint, layout, load, load_ranks):
    whole, ranks = load(checkpoint), load_ranks(checkpoint, layout)
    expected = {name: slot_view(whole.weights, slot) for name, slot in whole.image.layout.slots.items()}
    for driver, plan in zip(ranks.drivers, ranks.plans, strict=True):
        found = {name: slot_view(driver.weights, slot) for name, slot in driver.image.layout.slots.items()}
        parts = {name: plan.part_of(name, tensor.shape) for name, tensor in expected.items()}
        assert found.keys() == {name for name, part in parts.items() if part is not None}
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name][parts[name]]), name
        assert Shard.of(driver.image).place.label == driver.image.identity.shard
        assert (driver.image.path / "tokenizer" / "tokenizer.json").is_file()


def test_kv_cache_and_facts_are_the_ranks_own(checkpoint, load_ranks):
    first, second = load_ranks(checkpoint, RankPlace(0, 2, 1)).drivers
    assert [each.model.facts.attention.num_kv_heads for each in (first, second)] == [2, 1]
    assert [each.kv_cache.layout.bytes_per_block for each in (first, second)] == [
        each.model.shard.kv_bytes_per_token(itemsize=4) * BLOCK_SIZE for each in (first, second)
    ]
    assert first.model.facts.vocab_size == second.model.facts.vocab_size == 321


def test_all_images_come_from_one_reading(checkpoint, tmp_path, monkeypatch):
    """Would catch a conversion per rank."""
    from shuteye.memory.image_store import ImageStore
    from shuteye.models import image_builder

    readings = []

    def counting(*args, **options):
        readings.append(args)
        return open_checkpoint(*args, **options)

    open_checkpoint = image_builder.open_checkpoint
    monkeypatch.setattr(image_builder, "open_checkpoint", counting)
    source = resolve_source(str(checkpoint), cache_dir=tmp_path)
    store = ImageStore(tmp_path)
    places = RankPlace(0, 2, 2).all()
    images = on_all_ranks(
        [lambda place=place: open_image(source, dtype="auto", store=store, place=place) for place in places]
    )
    for image in images:
        image.close()
    assert len(readings) == 1
    assert {image.identity.shard for image in images} == {place.label for place in places}
    assert {summary.key for summary in store.list()} == {image.identity.key for image in images}


@pytest.mark.slow
def test_another_process_makes_the_images_of_all_ranks(tiny_checkpoint, tmp_path, monkeypatch):
    """Would catch an order that forgets on its way whose part is wanted."""
    order = Order(str(tiny_checkpoint), str(tmp_path), place=RankPlace(1, 2, 1))
    key = really_apart(order, no_progress)
    assert "-tp1of2.pp0of1-" in key
    monkeypatch.setattr(converter, "make_apart", None)
    for place in order.place.all():
        image = converter.obtain_image(replace(order, place=place), no_progress)
        assert image.identity.shard == place.label
        image.close()


@pytest.mark.slow
def test_the_other_process_says_which_setting_is_wrong(tiny_checkpoint, tmp_path):
    with pytest.raises(UnsupportedModel, match="at most 2") as refusal:
        really_apart(Order(str(tiny_checkpoint), str(tmp_path), place=RankPlace(0, 3, 1)), no_progress)
    assert refusal.value.param == "tensor_parallel_size"


def test_a_written_part_is_seen_as_the_whole_tensor_is(checkpoint, load, load_ranks):
    """What an update does: each rank takes its part of the unsharded tensor."""
    alone, ranks = load(checkpoint, native=False), load_ranks(checkpoint, RankPlace(0, 2, 2))
    for name in (EMBEDDING, "model.layers.0.self_attn.k_proj.weight", "model.layers.2.mlp.down_proj.weight"):
        slot = alone.image.layout.slots[name]
        tensor = torch.randn(slot.shape, generator=torch.Generator().manual_seed(1)) * 0.2
        slot_view(alone.weights, slot).copy_(tensor)
        for driver, plan in zip(ranks.drivers, ranks.plans, strict=True):
            part = plan.part_of(name, tensor.shape)
            if part is not None:
                slot_view(driver.weights, driver.image.layout.slots[name]).copy_(tensor[part])
    found, _ = greedy(ranks.logits, 3)
    expected, _ = greedy(alone.logits, 3)
    assert found == expected


@pytest.mark.parametrize(
    ("make", "layout", "param", "said"),
    [
        (lambda path: tiny_model(path, **NINE_ON_THREE), (4, 1), "tensor_parallel_size", "3 KV heads"),
        (tiny_model, (1, 3), "pipeline_parallel_size", "2 layers"),
        (lambda path: tiny_model(path, architecture="gpt2"), (2, 1), "tensor_parallel_size", "'gpt2'"),
        (tiny_encoder, (1, 2), "pipeline_parallel_size", "embed, score or classify"),
        (tiny_speech_model, (2, 1), "tensor_parallel_size", "Whisper"),
    ],
    ids=["groups", "layers", "not planned", "encoder", "speech"],
)
def test_what_cannot_be_split_is_refused_by_name(tmp_path, image_store, make, layout, param, said):
    source = resolve_source(str(make(tmp_path / "model")), cache_dir=tmp_path)
    with pytest.raises(UnsupportedModel) as refusal:
        open_image(source, dtype="auto", store=image_store, place=RankPlace(0, *layout))
    assert isinstance(refusal.value, InvalidRequest)
    assert refusal.value.param == param
    assert said in refusal.value.message
    assert source.name in refusal.value.message
