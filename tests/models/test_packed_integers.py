"""Safetensors of compressed-tensors, GPTQ and AWQ: which tensors they have, and what they stand for."""

import re

import numpy as np
import pytest
import torch
from packed_checkpoints import write_packed

from shuteye.errors import UnsupportedModel
from shuteye.matrices.kinds import kind_of
from shuteye.matrices.stored import dequantized
from shuteye.models.formats.quantized import fitted
from shuteye.models.formats.quantized_safetensors import open_safetensors, quantization_config
from shuteye.testing import tiny_model

READ = {
    "W4A16 symmetric": ("pack-quantized", {"scale_dtype": torch.bfloat16}, "int4_g32_bf16"),
    "W4A16 asymmetric": ("pack-quantized", {"symmetric": False}, "int4_g32_f16_zeros"),
    "W4A16 a row": ("pack-quantized", {"group": None, "symmetric": False}, "int4_row_f16_zeros"),
    "W8A16": ("pack-quantized", {"bits": 8}, "int8_g32_f16"),
    "W8A8": ("int-quantized", {"bits": 8, "group": None, "scale_dtype": torch.float32}, "int8_row_f32"),
    "W8A8 bfloat16": ("int-quantized", {"bits": 8, "group": None, "scale_dtype": torch.bfloat16}, "int8_row_bf16"),
    "AWQ": ("awq", {"symmetric": False}, "int4_g32_f16_zeros"),
    "GPTQ": ("gptq", {}, "int4_g32_f16"),
    "GPTQ asymmetric": ("gptq", {"symmetric": False}, "int4_g32_f16_zeros"),
    "GPTQ a row": ("gptq", {"group": None}, "int4_row_f16"),
    "GPTQ 8 bits": ("gptq", {"bits": 8}, "int8_g32_f16"),
}
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("packed") / "hf", num_layers=1)


def numbers(tensors, name):
    found = tensors.read(name)
    return found if isinstance(found, np.ndarray) else dequantized(found)


def read_all(path):
    config = quantization_config(path)
    assert config is not None
    with open_safetensors(path, config) as tensors:
        return tensors, {name: numbers(tensors, name) for name in (*tensors.matrices, *tensors.floats)}


def refused(path):
    with pytest.raises(UnsupportedModel) as caught:
        read_all(path)
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("case", READ)
def test_every_tensor_is_read_as_it_was_meant(tmp_path, checkpoint, case):
    """Nibbles in another order, a zero point off by one, scales of the neighbouring group: noise instead of words."""
    method, options, kind = READ[case]
    meant = write_packed(tmp_path / "packed", checkpoint, method, **options)
    tensors, found = read_all(tmp_path / "packed")
    assert tensors.is_tied
    assert tensors.matrices[f"{UP}.weight"] == (kind_of(kind), (128, 64))
    assert set(tensors.floats) == {name for name in meant if "proj" not in name}
    assert found.keys() == meant.keys()
    for name, expected in meant.items():
        assert np.array_equal(found[name], expected), name


@pytest.mark.parametrize("method", ["gptq", "pack-quantized"])
def test_rows_that_do_not_fill_words_of_zero_points(tmp_path, method):
    """Zero points of the last rows lost in the padding, or padding taken for rows."""
    made = tiny_model(tmp_path / "hf", num_layers=1, head_dim=4, num_attention_heads=8, num_key_value_heads=3)
    meant = write_packed(tmp_path / "packed", made, method, symmetric=False)
    assert len(meant["model.layers.0.self_attn.k_proj.weight"]) == 12
    _, found = read_all(tmp_path / "packed")
    for name, expected in meant.items():
        assert np.array_equal(found[name], expected), name


def test_zero_points_of_gptq_are_stored_in_two_versions(tmp_path, checkpoint):
    """Every weight off by one scale: the whole model answers `!!!!`."""

    def to_version_2(stored):
        for name, value in stored.items():
            if name.endswith("qzeros"):
                stored[name] = torch.from_numpy((value.numpy().view(np.uint32) + np.uint32(0x11111111)).view(np.int32))

    for name, symmetric, version in (("a", False, "gptq_v2"), ("b", True, "gptq"), ("c", True, "gptq_v2")):
        options = {
            "symmetric": symmetric,
            "declared": {"checkpoint_format": version},
        }  # (b) says one, and stores the other
        meant = write_packed(tmp_path / name, checkpoint, "gptq", edit=to_version_2, **options)
        _, found = read_all(tmp_path / name)
        assert np.array_equal(found[f"{UP}.weight"], meant[f"{UP}.weight"]), name


def test_a_zero_point_of_0_is_kept_apart_from_its_neighbours(tmp_path, checkpoint):
    """Version 1 stores -1 for it, by which a whole word was reduced; adding to single nibbles gives 16."""
    rows = {}

    def shift(stored):
        zeros = stored[f"{UP}.qzeros"].numpy().view(np.uint32) + np.uint32(0x11111111)
        rows["first"] = (zeros & 15).copy()
        stored[f"{UP}.qzeros"] = torch.from_numpy(((zeros & ~np.uint32(15)) - np.uint32(0x11111111)).view(np.int32))

    meant = write_packed(tmp_path / "packed", checkpoint, "gptq", symmetric=False, edit=shift)[f"{UP}.weight"]
    tensors, found = read_all(tmp_path / "packed")
    assert tensors.matrices[f"{UP}.weight"][0].has_zeros
    moved = (found[f"{UP}.weight"] - meant).reshape(16, 8, 2, 32)
    assert not moved[:, 1:].any()
    assert (moved[:, 0][rows["first"].T != 0] > 0).all()


def _act_order(stored):
    stored[f"{UP}.g_idx"] = stored[f"{UP}.g_idx"].flip(0)


def _no_middle(stored):
    stored[f"{UP}.qzeros"][0, 0] += 1


def _infinite(stored):
    stored[f"{UP}.scales"][0, 0] = torch.inf


def _short(stored):
    stored[f"{UP}.scales"] = stored[f"{UP}.scales"][:, :40].clone()


def _signed_zeros(stored):
    stored[f"{UP}.weight_zero_point"] = torch.ones_like(stored[f"{UP}.weight_scale"], dtype=torch.int8)


def _lost(stored):
    del stored[f"{UP}.qzeros"]


def _groups(**weights):
    given = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32} | weights
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": given}}}


REFUSED = {
    "another method": ("gptq", {"declared": {"quant_method": "hqq"}}, r"\(hqq\).*compressed-tensors, gptq, awq"),
    "GPTQ act-order": ("gptq", {"edit": _act_order}, r"up_proj.*act-order"),
    "GPTQ of 3 bits": ("gptq", {"declared": {"bits": 3}}, r"3 bits"),
    "GPTQ for marlin": ("gptq", {"declared": {"checkpoint_format": "marlin"}}, r"'marlin'"),
    "GPTQ with rules": ("gptq", {"declared": {"dynamic": {"-:.*down.*": {}}}}, r"dynamic"),
    "GPTQ not symmetric": ("gptq", {"edit": _no_middle}, r"up_proj.*called symmetric"),
    "GPTQ 8 bits with zeros": ("gptq", {"bits": 8, "symmetric": False}, r"8 bits and zero points"),
    "GPTQ without zeros": ("gptq", {"edit": _lost}, r"up_proj.*no qzeros"),
    "an infinite scale": ("gptq", {"edit": _infinite}, r"up_proj.*scales.*infinite"),
    "scales of other rows": ("gptq", {"edit": _short}, r"up_proj.*scales are \(40, 2\), expected \(128, 2\)"),
    "AWQ for gemv": ("awq", {"declared": {"version": "gemv"}}, r"'gemv'"),
    "AWQ without zeros": ("awq", {"declared": {"zero_point": False}}, r"without zero points"),
    "groups of 16": ("awq", {"group": 16}, r"groups of 16"),
    "fp8": ("int-quantized", {"bits": 8, "declared": {"format": "float-quantized"}}, r"float-quantized"),
    "nvfp4": ("pack-quantized", {"declared": _groups(type="float")}, r"float of 4 bits"),
    "2 bits": ("pack-quantized", {"declared": _groups(num_bits=2)}, r"int of 2 bits"),
    "blocks": ("pack-quantized", {"declared": _groups(strategy="block")}, r"strategy block"),
    "sparsity": (
        "pack-quantized",
        {"declared": {"sparsity_config": {"format": "sparse-24-bitmask"}}},
        r"sparse-24-bitmask",
    ),
    "rotations": ("pack-quantized", {"declared": {"transform_config": {"config_groups": {"u": {}}}}}, r"transforms"),
    "int8 with zeros": ("int-quantized", {"bits": 8, "edit": _signed_zeros}, r"up_proj.*8 bits and zero points"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused_by_name(tmp_path, checkpoint, case):
    """Weights that are nearly right: columns of other groups, zero points of another meaning, rotations left out."""
    method, options, says = REFUSED[case]
    write_packed(tmp_path / "packed", checkpoint, method, **options)
    assert re.search(says, refused(tmp_path / "packed"))


def test_a_module_s_tensors_are_all_there_and_no_others(tmp_path, checkpoint):
    """Weights that nobody computes with, or random ones in place of missing ones; but zeros do no harm."""
    write_packed(tmp_path / "packed", checkpoint, "gptq", edit=_with_more)
    config = quantization_config(tmp_path / "packed")
    with open_safetensors(tmp_path / "packed", config) as tensors:
        shapes = {name: shape for name, (_, shape) in tensors.matrices.items()} | dict(tensors.floats)
        del shapes[f"{UP}.bias"], shapes["lm_head.weight"]
        fits = fitted("a model", tensors, shapes)
        assert set(fits.matrices) | set(fits.floats) == set(shapes)
        for wrong, says in (
            (shapes | {"model.extra.weight": (3,)}, "missing: model.extra.weight"),
            (shapes | {f"{UP}.weight": (128, 32)}, f"of another shape: {UP}.weight"),
            (shapes.keys() - {f"{UP}.weight"}, f"unknown: {UP}.weight"),
            (shapes.keys() - {"model.norm.weight"}, "unknown: model.norm.weight"),
        ):
            with pytest.raises(UnsupportedModel, match=re.escape(says)):
                fitted("a model", tensors, wrong if isinstance(wrong, dict) else {name: shapes[name] for name in wrong})


def _with_more(stored):
    stored[f"{UP}.bias"] = torch.zeros(128)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()


@pytest.mark.parametrize("damage", [b"[1]", b'"gptq"'])
def test_a_damaged_quantization_config_is_refused(tmp_path, checkpoint, damage):
    """`AttributeError: 'list' object has no attribute 'get'`."""
    write_packed(tmp_path / "packed", checkpoint, "gptq")
    text = (tmp_path / "packed" / "config.json").read_bytes()
    (tmp_path / "packed" / "config.json").write_bytes(re.sub(rb'(?<="quantization_config": )\{.*?\}', damage, text))
    with pytest.raises(UnsupportedModel, match="'quantization_config' is no JSON object"):
        quantization_config(tmp_path / "packed")


def test_surprises_in_a_quantization_config_are_one_line(tmp_path, checkpoint):
    """A traceback of whatever a tool has written there."""
    write_packed(tmp_path / "packed", checkpoint, "pack-quantized", declared={"config_groups": ["group_0"]})
    assert "compressed-tensors" in refused(tmp_path / "packed")
