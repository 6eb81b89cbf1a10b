"""Quantized weights of models that transformers' modules compute: what is kept, computed, and refused."""

import os
from statistics import median

import numpy as np
import pytest
import torch
from packed_checkpoints import write_packed
from rank_models import greedy
from rounded_product import RoundedProduct
from tiny_gguf import write_gguf
from torch import nn

from shuteye import native
from shuteye.errors import UnsupportedModel
from shuteye.matrices.kinds import KINDS, ROWS
from shuteye.matrices.packing import unpack
from shuteye.matrices.quantize import quantize
from shuteye.models import packed_weight
from shuteye.models.packed_weight import PackedWeight
from shuteye.parallel.shards import RankPlace
from shuteye.testing import tiny_model

PROMPTS = [[5, 80, 33, 140, 12, 9], list(range(20, 60)), [7]]
ARCHITECTURES = {
    "gemma3_text": {"sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"]},  # scaled embeddings
    "gpt_neox": {"tie_word_embeddings": False},  # biases, projections in one
    "mixtral": {"num_local_experts": 4},  # experts in one tensor, a router
}
needs_native = pytest.mark.skipif(not native.available(), reason="there is no native library")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def checkpoint(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("modules") / request.param
    return tiny_model(directory, architecture=request.param, initializer_range=0.1, **ARCHITECTURES[request.param])


def quantized(image):
    """Every quantized matrix of an image, unpacked."""
    return {
        name: unpack(
            slot.matrix_kind, np.frombuffer(os.pread(image.fd, slot.nbytes, slot.offset), np.uint8), *slot.shape
        )
        for name, slot in image.layout.slots.items()
        if slot.matrix_kind.is_quantized
    }


def logits_of(driver, prompts):
    sequences = [driver.sequence(prompt, room=1) for prompt in prompts]
    driver.step(sequences, [1000] * len(prompts))
    return torch.stack([each.logits[0] for each in sequences])


def errors(found, expected):
    """Of each row, relative to it."""
    return ((found - expected).norm(dim=1) / expected.norm(dim=1)).tolist()


def test_modules_compute_with_the_weights_that_blocks_stand_for(checkpoint, load, reference):
    """A matrix unpacked as another's kind; a scale, a bias or a tie of the module that is lost."""
    driver = load(checkpoint, native=False, quantization="q5_0")
    kept = quantized(driver.image)
    assert len(kept) >= 8
    assert all(isinstance(driver.model.decoder.module.get_parameter(name), PackedWeight) for name in kept)
    model = reference.model(checkpoint, torch.float32)
    with torch.no_grad():
        for name, rows in kept.items():
            model.get_parameter(name).copy_(torch.from_numpy(rows))
        expected = torch.stack([model(torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS])
    torch.testing.assert_close(logits_of(driver, PROMPTS), expected, rtol=1e-3, atol=1e-3)


@needs_native
def test_native_products_round_activations_alone(checkpoint, load, monkeypatch):
    """Kernels given another matrix, a bias left out; or not called at all, which would round nothing."""
    found = logits_of(load(checkpoint, quantization="q5_0"), PROMPTS)
    unrounded = load(checkpoint, quantization="q5_0", native=False)
    exact = logits_of(unrounded, PROMPTS)
    monkeypatch.setattr(packed_weight, "Product", RoundedProduct)
    same = logits_of(unrounded, PROMPTS)
    assert median(errors(found, same)) <= 0.02 * median(errors(found, exact))


def test_only_what_is_multiplied_or_looked_up_is_quantized(tmp_path, load):
    """Routers rounded, which choose experts; tensors of experts put into blocks that no module reads."""
    made = tiny_model(tmp_path / "mixtral", architecture="mixtral", num_local_experts=4)
    slots = load(made, native=False, quantization="q4_0").image.layout.slots
    kinds = {name: slot.kind for name, slot in slots.items()}
    assert kinds["model.embed_tokens.weight"] == "q8_0"
    assert kinds["model.layers.0.self_attn.q_proj.weight"] == "q4_0"
    left = {
        name.removeprefix("model.layers.1.") for name, kind in kinds.items() if kind == ROWS.name and "layers.1" in name
    }
    assert {"mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"} <= left


@pytest.mark.parametrize("method", ["gptq", "awq", "int-quantized"])
def test_packed_checkpoints_keep_their_bits(tmp_path, load, method):
    """A checkpoint of another architecture blown up, or read as something else."""
    made = tiny_model(tmp_path / "gemma", architecture="gemma3_text", sliding_window=20, hidden_size=64)
    options = {"bits": 8, "group": None} if method == "int-quantized" else {"symmetric": method != "awq"}
    meant = write_packed(tmp_path / "packed", made, method, **options)
    driver = load(tmp_path / "packed", native=False, dtype="float32")
    kept = quantized(driver.image)
    assert {name for name in meant if ".layers." in name and meant[name].ndim == 2} == set(kept)
    for name, rows in kept.items():
        assert np.array_equal(rows, meant[name]), name
    assert torch.isfinite(logits_of(driver, PROMPTS)).all()


@pytest.mark.parametrize("architecture", ["gemma3_text", "starcoder2"])
def test_gguf_files_of_other_architectures_keep_their_blocks(tmp_path, load, reference, architecture):
    """Blocks under another matrix's name, norms as files have them (less one), or everything left to transformers."""
    made = tiny_model(tmp_path / "model", architecture=architecture, **ARCHITECTURES.get(architecture, {}))
    file = tmp_path / "tiny.gguf"
    meant = write_gguf(file, made, "q8_0")
    driver = load(file, native=False, dtype="float32")
    kept = quantized(driver.image)
    assert set(kept) == {name for name, rows in meant.items() if rows.ndim == 2}
    for name, rows in kept.items():
        assert np.array_equal(rows, meant[name]), name
    model = reference.model(file, torch.float32)
    with torch.no_grad():
        expected = torch.stack([model(torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS])
    torch.testing.assert_close(logits_of(driver, PROMPTS), expected, rtol=1e-3, atol=1e-3)


RANKS = {
    "gemma3_text": ({"intermediate_size": 288, "hidden_size": 128}, RankPlace(0, 2, 1)),  # tied: the head is rows of it
    "phi": ({"intermediate_size": 160, "hidden_size": 128, "tie_word_embeddings": False}, RankPlace(0, 2, 2)),
}


@pytest.mark.parametrize("architecture", RANKS)
def test_ranks_hold_parts_of_the_blocks_that_one_rank_holds(tmp_path, load, load_ranks, architecture):
    """A part quantized anew, with scales of its own; columns cut within blocks; a head of other rows."""
    sizes, place = RANKS[architecture]
    heads = {"head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_layers": 2}
    made = tiny_model(tmp_path / "model", architecture=architecture, **heads, **sizes)
    whole = load(made, native=False, quantization="q4_0")
    ranks = load_ranks(made, place, quantization="q4_0")
    kept, seen = quantized(whole.image), set()
    for driver in ranks.drivers:
        for name, rows in quantized(driver.image).items():
            part = driver.model.shard.part_of(name, kept[name].shape)
            assert np.array_equal(rows, kept[name][part]), name
            seen.add(name)
    assert seen == set(kept)
    tokens, logits = greedy(ranks.logits, 4)
    expected, close = greedy(whole.logits, 4)
    assert tokens == expected
    torch.testing.assert_close(logits, close, rtol=1e-3, atol=1e-3)


def test_columns_that_no_block_ends_at_are_refused_by_name(tmp_path, load_ranks):
    """Half a block, whose scale is another rank's."""
    made = tiny_model(tmp_path / "model", architecture="gemma3_text", head_dim=24, sliding_window=20)
    with pytest.raises(UnsupportedModel, match=r"o_proj.weight is held as q8_0.*columns 0 to 48") as refusal:
        load_ranks(made, RankPlace(0, 2, 1), quantization="q8_0")
    assert refusal.value.param == "tensor_parallel_size"


def test_another_use_of_a_quantized_weight_is_refused_by_name():
    """Numbers of nowhere: a weight without memory of its own that torch would read."""
    rows = torch.randn(32, 32)
    memory = torch.from_numpy(quantize(KINDS["q8_0"], rows.numpy()).packed().copy())
    linear = nn.Linear(32, 32, bias=False)
    linear.weight = PackedWeight.of_memory(memory, KINDS["q8_0"], (32, 32), torch.float32, native=False)
    torch.testing.assert_close(linear(torch.eye(32)).T, rows, rtol=0, atol=0.05)
    assert (linear.weight.dtype, tuple(linear.weight.shape)) == (torch.float32, (32, 32))
    for use in (lambda: linear.weight.T, lambda: linear.weight + 1, linear.weight.float, linear.bfloat16):
        with pytest.raises(UnsupportedModel, match="--quantization none"):
            use()
    with pytest.raises(UnsupportedModel, match="bfloat16"):
        linear(torch.eye(32, dtype=torch.bfloat16))
    with pytest.raises(IndexError, match="of 32"):
        nn.functional.embedding(torch.tensor([32]), linear.weight)
