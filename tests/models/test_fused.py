"""The flat decoder loop against the modules it replaces."""

import pytest
import torch

from shuteye.models import fused
from shuteye.models.fused import fuse
from shuteye.plans import Chunk, StepPlan
from shuteye.runner.batch import PackedBatch
from shuteye.testing import tiny_model

RECOGNISED = {
    "llama": {},
    "llama-untied-biased": {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "llama-scaled": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "qwen2": {},
    "qwen3": {},
    "mistral-window": {"sliding_window": 20},
}


@pytest.fixture(scope="module", params=RECOGNISED)
def checkpoint(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("fused") / request.param
    return tiny_model(directory, architecture=request.param.split("-")[0], **RECOGNISED[request.param])


def mixed_batches():
    """Steps that prefill, continue a chunk and decode, over the same blocks."""
    ids = torch.randint(3, 300, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    first = (Chunk("a", tuple(ids[:37]), 0, (3, 1, 5), False), Chunk("b", tuple(ids[:5]), 0, (2,), True))
    second = (Chunk("a", tuple(ids[37:50]), 37, (3, 1, 5, 4), True), Chunk("b", (ids[5],), 5, (2,), True))
    third = (Chunk("a", (ids[50],), 50, (3, 1, 5, 4), True), Chunk("b", (ids[6],), 6, (2,), True))
    return [PackedBatch.from_plan(StepPlan(chunks), block_size=16) for chunks in (first, second, third)]


def logits_of(model, kv_cache):
    return torch.cat([model.forward(batch, kv_cache) for batch in mixed_batches()])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.03)])
def test_the_loop_computes_what_the_modules_compute(checkpoint, load, dtype, tolerance):
    """Would catch a bias, norm, rotation or scale that the loop leaves out or rounds elsewhere."""
    driver = load(checkpoint, dtype=dtype)
    assert driver.model.fused is not None
    by_loop = logits_of(driver.model, driver.kv_cache)
    driver.model.fused = None
    by_modules = logits_of(driver.model, driver.kv_cache)
    assert by_loop.shape == by_modules.shape
    assert (by_loop - by_modules).abs().max() <= tolerance * by_modules.abs().max()


def test_the_loop_sees_weights_that_are_written(load, tiny_checkpoint):
    """Would catch a fused copy of a weight: it would go on with the old values, and never sleep."""
    driver = load(tiny_checkpoint)
    before = logits_of(driver.model, driver.kv_cache)
    driver.model.module.model.layers[0].self_attn.k_proj.weight.mul_(-1.0)
    assert not torch.allclose(logits_of(driver.model, driver.kv_cache), before)


@pytest.mark.parametrize("architecture", ["gemma3_text", "mixtral", "gpt2"])
def test_what_is_not_recognised_keeps_its_modules(architecture, tmp_path, load):
    extra = {"gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4}, "mixtral": {"num_local_experts": 2}}
    checkpoint = tiny_model(tmp_path / "m", architecture=architecture, **extra.get(architecture, {}))
    assert load(checkpoint).model.fused is None


def test_another_activation_is_not_recognised(tmp_path, load):
    assert load(tiny_model(tmp_path / "m", hidden_act="gelu")).model.fused is None


def test_projections_that_do_not_touch_are_not_fused(load, tiny_checkpoint, monkeypatch):
    """Would catch a wide view over padding between two weights."""
    driver = load(tiny_checkpoint)
    monkeypatch.setattr(fused, "pairwise", lambda slots: [(slots[0], slots[-1]), (slots[-1], slots[0])])
    assert fuse(driver.model.module, driver.image.layout, driver.weights) is None
