"""Quantized checkpoints on their way into images: what the image's bytes stand for, and what comes of them."""

import os

import numpy as np
import pytest
import torch
from packed_checkpoints import write_packed
from tiny_gguf import write_gguf

from shuteye.errors import UnsupportedModel
from shuteye.matrices.kinds import kind_of
from shuteye.matrices.packing import unpack
from shuteye.models.formats.checkpoint import stored_as
from shuteye.models.image_builder import open_image
from shuteye.models.image_form import ImageForm
from shuteye.models.sources import resolve_source
from shuteye.testing import tiny_model

PROMPT = [5, 80, 33, 140, 12, 9]
UP = "model.layers.1.mlp.up_proj.weight"
MADE = {
    "GGUF": lambda path, made: write_gguf(path.with_suffix(".gguf"), made, "q5_1"),
    "AWQ": lambda path, made: write_packed(path, made, "awq", symmetric=False),
    "GPTQ": lambda path, made: write_packed(path, made, "gptq"),
    "W4A16": lambda path, made: write_packed(path, made, "pack-quantized", scale_dtype=torch.bfloat16),
    "W8A8": lambda path, made: write_packed(path, made, "int-quantized", bits=8, group=None),
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("quantized") / "hf", architecture="qwen2", tie_word_embeddings=False)


@pytest.fixture
def made(tmp_path, checkpoint):
    """Makes a quantized checkpoint: its path, and what its tensors stand for."""

    def make(case):
        meant = MADE[case](tmp_path / "model", checkpoint)
        return next(path for path in tmp_path.iterdir() if path.name.startswith("model")), meant

    return make


@pytest.fixture
def image_of(image_store, tmp_path):
    """The image of a checkpoint, open while the test runs."""
    images = []

    def open_one(path, quantization="auto"):
        source = resolve_source(str(path), cache_dir=tmp_path)
        images.append(open_image(source, dtype="float32", store=image_store, form=ImageForm(quantization)))
        return images[-1]

    yield open_one
    for image in images:
        image.close()


def matrices(image):
    """Every quantized matrix of an image, unpacked."""
    found = {}
    for name, slot in image.layout.slots.items():
        kind = kind_of(slot.kind)
        if kind.is_quantized:
            memory = np.frombuffer(os.pread(image.fd, slot.nbytes, slot.offset), np.uint8)
            found[name] = unpack(kind, memory, *slot.shape)
    return found


@pytest.mark.parametrize("case", MADE)
def test_an_image_has_the_weights_of_its_checkpoint(image_of, made, case):
    """Numbers changed on the way: dequantized and quantized again, rows of another tensor, a panel left out."""
    path, meant = made(case)
    found = matrices(image_of(path))
    assert UP in found
    for name, rows in found.items():
        assert np.array_equal(rows, meant[name]), name
    layers = {name for name in meant if "_proj.weight" in name}
    assert found.keys() == (layers | {"lm_head.weight", "model.embed_tokens.weight"} if case == "GGUF" else layers)


@pytest.mark.parametrize("case", MADE)
def test_it_says_what_the_dequantized_model_says(load, made, reference, checkpoint, case):
    """A scale applied twice, a bias lost, a matrix of another kind taken for its neighbour's."""
    path, meant = made(case)
    driver = load(path, dtype="float32", native=False)
    model = reference.model(checkpoint, torch.float32)
    model.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(rows)) for name, rows in meant.items()})
    assert driver.generate([PROMPT], 12) == [reference.tokens(model, PROMPT, 12)]


@pytest.mark.parametrize("case", ["GGUF", "GPTQ"])
def test_without_quantization_the_image_has_the_same_weights_wide(image_of, made, case):
    """`--quantization none` of a checkpoint that transformers cannot open here, or opens with other numbers."""
    path, meant = made(case)
    image = image_of(path, "none")
    assert not matrices(image)
    slot = image.layout.slots[UP]
    found = np.frombuffer(os.pread(image.fd, slot.nbytes, slot.offset), np.float32).reshape(slot.shape)
    assert np.array_equal(found, meant[UP])


def test_formats_that_only_transformers_reads_are_refused_unless_dequantized(image_of, tmp_path):
    """A file that was served before, and is not any more, whatever is asked for."""
    made = tiny_model(tmp_path / "hf", hidden_size=256, intermediate_size=256, head_dim=64)
    meant = write_gguf(tmp_path / "model.gguf", made, lambda name: "iq2_xs" if "up_proj" in name else "q8_0")
    with pytest.raises(UnsupportedModel, match=r"ffn_up.weight is stored as IQ2_XS.*or --quantization none"):
        image_of(tmp_path / "model.gguf")
    image = image_of(tmp_path / "model.gguf", "none")
    slot = image.layout.slots[UP]
    found = np.frombuffer(os.pread(image.fd, slot.nbytes, slot.offset), np.float32).reshape(slot.shape)
    assert np.array_equal(found, meant[UP])


@pytest.mark.parametrize(
    ("case", "told"),
    [("GPTQ", "safetensors gptq 4 bits"), ("W8A8", "safetensors compressed-tensors int-quantized")],
)
def test_how_numbers_are_stored_is_told(made, tmp_path, case, told):
    """`safetensors I32`, of which nobody knows what it means."""
    path, _ = made(case)
    assert stored_as(resolve_source(str(path), cache_dir=tmp_path)) == told


def test_packed_modules_that_transformers_would_put_together_are_refused_by_name(image_of, tmp_path):
    """Experts that lie one by one in the file, and in one tensor in the module: words cast to floats."""
    made = tiny_model(tmp_path / "hf", architecture="mixtral", num_local_experts=4)
    write_packed(tmp_path / "packed", made, "gptq")
    with pytest.raises(UnsupportedModel, match=r"packed is quantized, and transformers would load its tensors changed"):
        image_of(tmp_path / "packed")


def test_a_quantized_checkpoint_is_not_quantized_again(image_of, made):
    """Two roundings, one after the other, that nobody asked for."""
    path, _ = made("AWQ")
    with pytest.raises(UnsupportedModel, match="quantized already"):
        image_of(path, "q8_0")
