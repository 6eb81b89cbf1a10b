"""Checkpoints in few bits become images of the same bits, whole or in parts; else what was asked for, or a refusal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from packed_checkpoints import write_packed
from rank_models import greedy
from tiny_gguf import write_gguf

from shuteye.errors import UnsupportedModel
from shuteye.matrices.kinds import BF16, ROWS, kind_of
from shuteye.matrices.packing import unpack
from shuteye.memory.precision import Precision
from shuteye.models.fused import INVERSE_FREQUENCIES
from shuteye.models.image_builder import open_image
from shuteye.models.image_form import ImageForm
from shuteye.models.sources import resolve_source
from shuteye.models.tensors import slot_view
from shuteye.parallel.shards import EMBEDDING, RankPlace
from shuteye.testing import tiny_model

SHAPE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_layers": 2}
MIXED = {"embed_tokens": "q6_k", "v_proj": "q6_k", "down_proj": "q5_k", "o_proj": "q8_0", "k_proj": "bf16"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("quantized") / "llama", **SHAPE)


@pytest.fixture(scope="module")
def gguf(checkpoint, tmp_path_factory):
    """A file of mixed formats, and what its tensors stand for."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, write_gguf(path, checkpoint, lambda name: MIXED.get(name.split(".")[-2], "q4_k"))


def held(driver, name):
    """What a slot stands for."""
    slot = driver.image.layout.slots[name]
    if slot.kind == ROWS.name:
        return slot_view(driver.weights, slot).float().numpy()
    memory = np.frombuffer(driver.weights.bytes_view(slot.offset, slot.nbytes), np.uint8)
    return unpack(slot.matrix_kind, memory, *slot.shape)


def test_an_image_holds_the_bits_of_the_file(gguf, load):
    """Would catch a tensor that is rounded on its way, one that lands in another's kind, or rows out of order."""
    path, meant = gguf
    driver = load(path)
    kinds = {name: slot.kind for name, slot in driver.image.layout.slots.items()}
    assert kinds["model.layers.1.mlp.down_proj.weight"] == "q5_k"
    assert kinds["model.layers.0.mlp.up_proj.weight"] == "q4_k"
    assert kinds["model.layers.0.self_attn.k_proj.weight"] == BF16.name
    assert kinds["model.norm.weight"] == ROWS.name
    assert kinds.keys() == meant.keys()
    for name, expected in meant.items():
        found = held(driver, name)
        if kind_of(kinds[name]).is_quantized:
            assert np.array_equal(found.view(np.uint32), expected.view(np.uint32)), name
        else:
            assert np.allclose(found, expected, rtol=2**-8), name
    assert Precision.of(driver.image.layout).bits_per_weight < 8


def test_torch_computes_from_blocks_what_it_computes_from_their_numbers(gguf, load):
    """Would catch a product or an embedding that reads a packed matrix as if it lay in rows."""
    path, _ = gguf
    kept = load(path, dtype="float32", native=False)
    plain = load(path, dtype="float32", native=False, quantization="none")
    assert {slot.kind for slot in plain.image.layout.slots.values()} == {ROWS.name}
    found, expected = greedy(kept.logits, 3), greedy(plain.logits, 3)
    assert found[0] == expected[0]
    assert (found[1] - expected[1]).abs().max() <= 1e-4 * expected[1].abs().max()


def test_rotary_factors_of_a_file_are_applied(checkpoint, load, tmp_path):
    """Would catch a Llama 3.1 in GGUF form whose long contexts are positions that it was never taught."""
    factors = np.linspace(1, 8, SHAPE["head_dim"] // 2, dtype=np.float32)
    write_gguf(tmp_path / "plain.gguf", checkpoint, "q8_0")
    write_gguf(tmp_path / "scaled.gguf", checkpoint, "q8_0", extra={"rope_freqs.weight": factors})
    plain, scaled = (load(tmp_path / name).image.read_buffers() for name in ("plain.gguf", "scaled.gguf"))
    frequencies = [np.frombuffer(each[INVERSE_FREQUENCIES].content, np.float32) for each in (plain, scaled)]
    assert np.allclose(frequencies[0] / factors, frequencies[1])


@pytest.mark.parametrize("wanted", ["q8_0", "q4_0", "q5_1"])
def test_a_checkpoint_is_quantized_on_its_way(checkpoint, load, wanted):
    """Would catch matrices left out, norms quantized, or an embedding in four bits."""
    driver, exact = load(checkpoint, quantization=wanted), load(checkpoint, modules=True)
    kinds = {name: slot.kind for name, slot in driver.image.layout.slots.items()}
    assert kinds[EMBEDDING] == "q8_0"
    matrices = [name for name in kinds if name.endswith("_proj.weight")]
    assert len(matrices) == 7 * SHAPE["num_layers"]
    assert {kinds[name] for name in matrices} == {wanted}
    assert {kinds[name] for name in kinds if "norm" in name} == {ROWS.name}
    for name in matrices:
        found, expected = held(driver, name), held(exact, name)
        assert np.abs(found - expected).max() <= 0.15 * np.abs(expected).max(), name


def test_each_wish_has_an_image_of_its_own(checkpoint, load):
    """Would catch an image that is served in place of another form of the same checkpoint."""
    drivers = [load(checkpoint, quantization=wanted, dtype="bfloat16") for wanted in ("auto", "q8_0", "none")]
    drivers.append(load(checkpoint, dtype="bfloat16", native=False))
    assert len({driver.image.path for driver in drivers}) == len(drivers)
    packed, *_, rows = drivers
    assert packed.image.layout.slots[EMBEDDING].kind == BF16.name
    assert rows.image.layout.slots[EMBEDDING].kind == ROWS.name
    for name in packed.image.layout.slots:
        assert np.array_equal(held(packed, name), held(rows, name)), name


@pytest.mark.parametrize("layout", [(2, 1), (1, 2)], ids=["TP 2", "PP 2"])
def test_ranks_hold_parts_in_the_same_bits(checkpoint, tmp_path, load, load_ranks, layout):
    """Would catch a part that is cut within a block, or requantized."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path, checkpoint, lambda name: "q4_k" if "down_proj" in name else "q4_0")
    whole, ranks = load(path, native=False), load_ranks(path, RankPlace(0, *layout))
    for driver, plan in zip(ranks.drivers, ranks.plans, strict=True):
        for name, slot in driver.image.layout.slots.items():
            assert slot.kind == whole.image.layout.slots[name].kind
            part = plan.part_of(name, whole.image.layout.slots[name].shape)
            assert np.array_equal(held(driver, name), held(whole, name)[part]), name
    found, expected = greedy(ranks.logits, 3), greedy(whole.logits, 3)
    assert (found[1] - expected[1]).abs().max() <= 0.05 * expected[1].abs().max()


def test_a_cut_within_blocks_is_refused_by_name(gguf, image_store, tmp_path):
    """Would catch heads that are given half a block of 256 columns."""
    path = tmp_path / "tiny.gguf"
    shape = SHAPE | {"num_attention_heads": 4, "num_key_value_heads": 2}
    write_gguf(path, tiny_model(tmp_path / "made", **shape), "q4_k")
    source = resolve_source(str(path), cache_dir=tmp_path)
    with pytest.raises(UnsupportedModel, match=r"o_proj\.weight is held as q4_k, in blocks of 256 columns") as refusal:
        open_image(source, dtype="auto", store=image_store, place=RankPlace(0, 2, 1))
    assert refusal.value.param == "tensor_parallel_size"
    assert "pipeline_parallel_size" in refusal.value.message


def _packed(path):
    write_packed(path, tiny_model(path.with_name("float"), architecture="phi"), "gptq")
    return path


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path, gguf: gguf[0], "is quantized already"),
        (lambda path, gguf: _packed(path), "is quantized already"),
    ],
    ids=["GGUF", "modules"],
)
def test_what_cannot_be_quantized_is_refused_by_name(gguf, image_store, tmp_path, make, said):
    source = resolve_source(str(make(tmp_path / "model", gguf)), cache_dir=tmp_path)
    with pytest.raises(UnsupportedModel, match=said) as refusal:
        open_image(source, dtype="auto", store=image_store, form=ImageForm("q4_0"))
    assert refusal.value.param == "quantization"


def test_panels_of_bfloat16_hold_what_rows_hold_whatever_the_sizes(load, tmp_path):
    """Would catch padding that is read as weights: heads of 6, a vocabulary that no panel divides."""
    sizes = {"hidden_size": 36, "num_attention_heads": 6, "head_dim": 6, "vocab_size": 323, "intermediate_size": 50}
    checkpoint = tiny_model(tmp_path / "odd", **sizes, dtype=torch.bfloat16)
    packed, rows = load(checkpoint), load(checkpoint, native=False)
    assert packed.image.layout.slots[EMBEDDING].kind == BF16.name
    for name in rows.image.layout.slots:
        assert np.array_equal(held(packed, name), held(rows, name)), name
    found, expected = greedy(packed.logits, 3)[1], greedy(rows.logits, 3)[1]
    assert (found - expected).abs().max() <= 0.05 * expected.abs().max()
