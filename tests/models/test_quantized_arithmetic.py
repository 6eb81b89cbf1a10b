"""What native kernels compute from quantized matrices, against torch with activations rounded as theirs are."""

from __future__ import annotations

from statistics import median
from typing import Any

import pytest
from rank_models import BLOCK_SIZE, batches
from rounded_product import RoundedProduct
from tiny_gguf import write_gguf

from shuteye import native
from shuteye.models import torch_loop
from shuteye.tasks.generate.plans import Chunk
from shuteye.testing import tiny_model

SHAPE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_layers": 2}
FILES = {
    "mixed": lambda name: {"embed_tokens": "q6_k", "v_proj": "q6_k", "down_proj": "q5_k"}.get(
        name.split(".")[-2], "q4_k"
    ),
    **{name: name for name in ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k", "iq4_nl", "iq4_xs")},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Weights so small that no layer makes much of a rounding before it."""
    directory = tmp_path_factory.mktemp("arithmetic") / "llama"
    return tiny_model(directory, tie_word_embeddings=False, initializer_range=0.05, **SHAPE)


def logits_of(driver, prompts):
    """Of the last token of each, computed in one step."""
    tables = iter(range(1, 200))
    chunks = [
        Chunk(str(index), tuple(ids), 0, tuple(next(tables) for _ in range(-(-len(ids) // BLOCK_SIZE))), True)
        for index, ids in enumerate(prompts)
    ]
    (batch,) = batches([chunks])
    return driver.logits(batch)


def errors(found, expected):
    """Of each row, relative to it."""
    return ((found - expected).norm(dim=1) / expected.norm(dim=1)).tolist()


@pytest.mark.skipif(not native.available(), reason="there is no native library")
@pytest.mark.parametrize("file", FILES)
def test_products_are_those_of_the_same_arithmetic(checkpoint, load, tmp_path, monkeypatch, file):
    """Would catch a matrix read as another's kind, a scale of another block, gate and up that change places.

    An activation may be rounded to the other neighbour where sums were made in another order, as some are in a long
    prompt; of a single token hardly any.
    """
    path = tmp_path / "tiny.gguf"
    write_gguf(path, checkpoint, FILES[file])
    kernels = load(path, dtype="float32")
    assert kernels.model.decoder.native_tokens
    exact = load(path, dtype="float32", native=False)
    monkeypatch.setattr(torch_loop, "Product", RoundedProduct)
    reference = load(path, dtype="float32", native=False)
    for prompts, same_as in (([[each] for each in range(20, 35)], 0.01), ([list(range(20, 140))] * 2, 1.0)):
        found, same, true = (logits_of(driver, prompts) for driver in (kernels, reference, exact))
        assert median(errors(found, same)) <= same_as * median(errors(found, true))
        assert max(errors(found, same)) <= 0.02


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not native.available(), reason="there is no native library")
def test_smollm2_says_in_its_own_bits_what_the_same_arithmetic_says(smollm2, load, monkeypatch):
    """Thirty layers of Q4_1 and Q8_0: would catch what two layers of random weights forgive."""
    prompts = [list(range(100, 137)), [504, 3575, 282, 4649, 314], [1], [28]]
    kernels = load(smollm2, dtype="float32")
    monkeypatch.setattr(torch_loop, "Product", RoundedProduct)
    reference = load(smollm2, dtype="float32", native=False)
    found, expected = (logits_of(driver, prompts) for driver in (kernels, reference))
    assert found.argmax(dim=1).tolist() == expected.argmax(dim=1).tolist()
    assert max(errors(found, expected)) <= 0.02
    assert kernels.generate(prompts, 24) == reference.generate(prompts, 24)
