"""The flat decoder loop against the modules it replaces."""

import subprocess
import sys

import pytest
import torch

from shuteye.models.fused import FusedDecoder
from shuteye.models.module_decoder import ModuleDecoder
from shuteye.models.tensors import slot_view
from shuteye.tasks.generate.plans import Chunk, StepPlan
from shuteye.tasks.generate.runner import PackedBatch
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
    return torch.cat([torch.from_numpy(model.forward(batch, kv_cache)) for batch in mixed_batches()])


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
def test_the_loop_computes_what_the_modules_compute(checkpoint, load, native):
    """Would catch a bias, norm, rotation or scale that the loop leaves out."""
    loop, modules = load(checkpoint, native=native), load(checkpoint, modules=True)
    assert isinstance(loop.model.decoder, FusedDecoder)
    assert isinstance(modules.model.decoder, ModuleDecoder)
    found, expected = (logits_of(driver.model, driver.kv_cache) for driver in (loop, modules))
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
def test_in_bfloat16_the_loop_is_as_accurate_as_the_modules(checkpoint, load, native):
    """Against the same weights in float32: each rounds in places of its own, and may be no worse for it."""
    loop = load(checkpoint, dtype="bfloat16", native=native)
    modules = load(checkpoint, dtype="bfloat16", modules=True)
    rounded, exact = load(checkpoint, dtype="bfloat16"), load(checkpoint, dtype="float32", modules=True)
    for name, slot in exact.image.layout.slots.items():
        slot_view(exact.weights, slot).copy_(slot_view(rounded.weights, rounded.image.layout.slots[name]))
    truth = logits_of(exact.model, exact.kv_cache)
    errors = [(logits_of(driver.model, driver.kv_cache) - truth).norm() for driver in (loop, modules)]
    assert 0 < errors[0] <= 1.5 * errors[1]


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
def test_the_loop_sees_weights_that_are_written(load, tiny_checkpoint, native):
    """Would catch a fused copy of a weight: it would go on with the old values, and never sleep."""
    driver = load(tiny_checkpoint, native=native)
    before = logits_of(driver.model, driver.kv_cache)
    slot = driver.image.layout.slots["model.layers.0.self_attn.k_proj.weight"]
    slot_view(driver.weights, slot).mul_(-1.0)
    assert not torch.allclose(logits_of(driver.model, driver.kv_cache), before)


@pytest.mark.parametrize("architecture", ["gemma3_text", "mixtral", "gpt2"])
def test_what_is_not_recognised_keeps_its_modules(architecture, tmp_path, load):
    extra = {"gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4}, "mixtral": {"num_local_experts": 2}}
    checkpoint = tiny_model(tmp_path / "m", architecture=architecture, **extra.get(architecture, {}))
    assert isinstance(load(checkpoint).model.decoder, ModuleDecoder)


def test_another_activation_is_not_recognised(tmp_path, load):
    assert isinstance(load(tiny_model(tmp_path / "m", hidden_act="gelu")).model.decoder, ModuleDecoder)


def test_an_image_of_a_recognised_model_is_served_without_transformers(tiny_checkpoint, core_cache):
    """Would catch an import that costs seconds at every start; test_converter.py has a start that makes the image."""
    program = f"""
import sys
from pathlib import Path
from shuteye.config import EngineConfig
from shuteye.executors.inproc import InprocExecutor
from shuteye.models.tensors import slot_view
InprocExecutor(EngineConfig(model={str(tiny_checkpoint)!r}, cache_dir=Path({str(core_cache)!r}))).close()
print("transformers" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
