"""GGUF files of llama-like models: which tensors they have, and what they stand for."""

from contextlib import suppress

import numpy as np
import pytest
from gguf import MODEL_ARCH, get_tensor_name_map
from tiny_gguf import ARCHITECTURES, write_gguf

from shuteye.errors import UnsupportedModel
from shuteye.matrices.kinds import KINDS, kind_of
from shuteye.matrices.stored import dequantized
from shuteye.models.formats.gguf import hf_name, open_gguf
from shuteye.models.formats.gguf_header import read_gguf_header
from shuteye.testing import tiny_model

ALL_FORMATS = ("f32", "f16", "bf16", *(name for name in KINDS if name not in ("rows", "bf16")))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Wide enough for blocks of 256 columns."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_layers": 1}
    return tiny_model(tmp_path_factory.mktemp("gguf") / "llama", tie_word_embeddings=False, **shape)


def numbers(tensors, name):
    found = tensors.read(name)
    return found if isinstance(found, np.ndarray) else dequantized(found)


def same(found, expected):
    return found.shape == expected.shape and np.array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_names_are_those_of_the_gguf_package(architecture):
    """A name that is taken for another tensor's: norms before and after attention have swapped in other readers."""
    known = get_tensor_name_map(MODEL_ARCH[architecture.upper()], 40)
    for theirs in ("token_embd.weight", "output.weight", "output_norm.weight", "blk.37.attn_q.bias",
                   *(f"blk.3.{each}.weight" for each in ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output",
                     "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"))):  # fmt: skip
        assert known.get_name(hf_name(theirs), try_suffixes=(".weight", ".bias")) == theirs
    assert known.get_name("model.layers.1.self_attn.q_norm.weight", try_suffixes=(".weight",)) in (
        None,
        "blk.1.attn_q_norm.weight",
    )
    assert hf_name("blk.1.attn_k_norm.weight") == "model.layers.1.self_attn.k_norm.weight"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tensor_is_read_as_it_was_meant(tmp_path, architecture):
    """Query heads in the order of llama.cpp, biases forgotten, a tied head taken for a missing one."""
    made = tiny_model(tmp_path / "hf", architecture=architecture, hidden_size=96, num_layers=2)
    mixed = {"q_proj": "q5_1", "k_proj": "q4_1", "down_proj": "q8_0", "embed_tokens": "bf16", "o_proj": "f16"}
    meant = write_gguf(tmp_path / "model.gguf", made, lambda name: mixed.get(name.split(".")[-2], "q4_0"))
    with open_gguf(tmp_path / "model.gguf") as tensors:
        assert tensors.is_tied
        assert tensors.rope_factors is None
        assert set(tensors.matrices) | set(tensors.floats) == set(meant)
        assert tensors.matrices["model.layers.1.self_attn.q_proj.weight"] == (kind_of("q5_1"), (64, 96))
        assert tensors.floats["model.layers.1.self_attn.o_proj.weight"] == (96, 64)
        for name, expected in meant.items():
            assert same(numbers(tensors, name), expected), name


@pytest.mark.parametrize("name", ALL_FORMATS)
def test_every_format_is_read(tmp_path, checkpoint, name):
    """One format whose blocks are of another size than is thought."""
    meant = write_gguf(tmp_path / "model.gguf", checkpoint, name)
    with open_gguf(tmp_path / "model.gguf") as tensors:
        assert not tensors.is_tied
        for each, expected in meant.items():
            assert same(numbers(tensors, each), expected), each


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_transformers_reads_the_same_numbers(tmp_path, architecture, reference):
    """Files that only we understand, because the test's writer and our reader share a mistake."""
    import torch

    made = tiny_model(tmp_path / "hf", architecture=architecture)
    write_gguf(tmp_path / "model.gguf", made, "q4_1")
    theirs = reference.model(tmp_path / "model.gguf", torch.float32).state_dict()
    with open_gguf(tmp_path / "model.gguf") as tensors:
        for name in (*tensors.matrices, *tensors.floats):
            assert np.array_equal(numbers(tensors, name), theirs[name].numpy()), name


def test_factors_of_rotary_frequencies_are_found(tmp_path, checkpoint):
    """Llama 3.1 served with the frequencies of Llama 3: wrong beyond a few thousand tokens, and nobody told."""
    factors = np.linspace(1, 8, 32, dtype=np.float32)
    write_gguf(tmp_path / "model.gguf", checkpoint, "q8_0", extra={"rope_freqs.weight": factors})
    with open_gguf(tmp_path / "model.gguf") as tensors:
        assert np.array_equal(tensors.rope_factors, factors)
        assert not any("rope" in name for name in tensors.floats)


def read_all(path):
    with open_gguf(path) as tensors:
        for name in (*tensors.matrices, *tensors.floats):
            tensors.read(name)


def refused(path):
    with pytest.raises(UnsupportedModel) as caught:
        read_all(path)
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"blk.0.ffn_gate_exps.weight": np.ones((2, 32, 32), np.float32)}, "ffn_gate_exps"),
        ({"blk.0.attn_sinks.weight": np.ones(4, np.float32)}, "attn_sinks"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(tmp_path, checkpoint, extra, says):
    """Experts or sinks dropped: a model that answers, wrongly."""
    write_gguf(tmp_path / "model.gguf", checkpoint, "q8_0", extra=extra)
    assert says in refused(tmp_path / "model.gguf")


def test_formats_that_are_not_read_are_named(tmp_path, checkpoint):
    """`KeyError: 'TQ1_0'`, after a gigabyte was read."""
    write_gguf(tmp_path / "model.gguf", checkpoint, "tq1_0")
    message = refused(tmp_path / "model.gguf")
    assert "TQ1_0" in message
    assert "Q4_K" in message


def test_a_scale_that_is_no_number_is_refused(tmp_path, checkpoint):
    """Logits that are NaN, for whoever asks first."""
    path = tmp_path / "model.gguf"
    write_gguf(path, checkpoint, "q4_k")
    damaged = bytearray(path.read_bytes())
    where = read_gguf_header(path).tensors["blk.0.ffn_up.weight"].offset + 5 * 144
    damaged[where : where + 2] = b"\x00\x7c"
    path.write_bytes(damaged)
    assert "blk.0.ffn_up.weight has a scale that is infinite" in refused(path)


def test_whatever_is_cut_or_changed_is_refused_and_never_crashes(tmp_path, checkpoint):
    """An exception of numpy's or struct's, an endless loop, memory for 2^60 texts: from a file off the internet."""
    path = tmp_path / "model.gguf"
    write_gguf(path, checkpoint, "q8_0")
    whole = path.read_bytes()
    start = min(tensor.offset for tensor in read_gguf_header(path).tensors.values())
    random = np.random.default_rng(12)
    for end in random.integers(0, start, 40):
        path.write_bytes(whole[:end])
        refused(path)
    accepted = 0
    for _ in range(200):
        damaged = bytearray(whole)
        where = int(random.integers(0, start - 8))
        damaged[where : where + 8] = random.bytes(8)
        path.write_bytes(damaged)
        with suppress(UnsupportedModel):
            read_all(path)
            accepted += 1  # what was hit is a token's text, say
    assert accepted < 200
