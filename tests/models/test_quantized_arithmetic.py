"""What native kernels compute from quantized matrices, against torch with activations rounded as theirs are."""

from __future__ import annotations

from statistics import median
from typing import Any, ClassVar

import pytest
import torch
from rank_models import BLOCK_SIZE, batches
from rounded_product import RoundedProduct
from tiny_gguf import write_gguf

from shuteye import native
from shuteye.matrices.matrix import Matrix
from shuteye.models import torch_loop
from shuteye.native import kernels
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
    natively = load(path, dtype="float32")
    assert natively.model.decoder.native_tokens
    exact = load(path, dtype="float32", native=False)
    monkeypatch.setattr(torch_loop, "Product", RoundedProduct)
    reference = load(path, dtype="float32", native=False)
    for prompts, same_as in (([[each] for each in range(20, 35)], 0.01), ([list(range(20, 140))] * 2, 1.0)):
        found, same, true = (logits_of(driver, prompts) for driver in (natively, reference, exact))
        assert median(errors(found, same)) <= same_as * median(errors(found, true))
        assert max(errors(found, same)) <= 0.02


class Recorded(RoundedProduct):
    """Keeps what each matrix was given and what came of it, in the order of the calls."""

    calls: ClassVar[list[tuple[Matrix, torch.Tensor, torch.Tensor]]]

    def __call__(self, x):
        product = super().__call__(x)
        self.calls.append((self._matrix, x.clone(), product))
        return product


WORDS = [list(range(100, 137)), [504, 3575, 282, 4649, 314], [1], [28]]

real_model = [
    pytest.mark.model,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not native.available(), reason="there is no native library"),
]


@pytest.fixture
def load_with(smollm2, load, monkeypatch):
    """SmolLM2 in torch, whose products are of another class."""

    def load_with(product):
        monkeypatch.setattr(torch_loop, "Product", product)
        return load(smollm2, dtype="float32", native=False)

    return load_with


class TestSmolLM2:
    """Thirty layers of Q4_1 and Q8_0, and activations that two layers of random weights do not have: one in a thousand
    columns is a hundred times the others.
    """

    pytestmark = real_model

    def test_each_product_of_a_step_is_that_of_the_same_arithmetic(self, load_with, monkeypatch):
        """Would catch a kernel that is right for some matrices alone.

        Of some hundred thousand activations a few lie between two integers so that their rounding is a matter of luck.
        """
        monkeypatch.setattr(Recorded, "calls", [], raising=False)
        logits_of(load_with(Recorded), WORDS)
        assert len(Recorded.calls) == 30 * 7 + 1
        rows = []
        for matrix, x, expected in Recorded.calls:
            rows += errors(kernels.linear(x, matrix, None, torch.empty_like(expected)), expected)
        assert median(rows) <= 1e-6
        assert sum(row > 1e-5 for row in rows) <= len(rows) / 500
        assert max(rows) <= 0.01

    def test_all_layers_are_those_of_the_same_arithmetic_where_no_rounding_is_a_matter_of_luck(
        self, smollm2, load, load_with
    ):
        """Would catch an error between the products, such as a norm or an attention that is nearly right.

        Neither long prompts nor greedy tokens can: one activation that is rounded the other way moves logits by
        some hundredths thirty layers later, and the last bit of float32 decides which way it goes. Among many pairs of
        tokens there are some without any.
        """
        natively, reference = load(smollm2, dtype="float32"), load_with(RoundedProduct)
        found = []
        for second in (1000, 2000, 3000):
            pairs = [[first, second + first] for first in range(100, 290)]
            found += errors(logits_of(natively, pairs), logits_of(reference, pairs))
        assert min(found) <= 1e-5
        assert median(found) <= 0.02
