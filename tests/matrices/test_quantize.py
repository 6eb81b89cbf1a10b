"""Matrices quantized while an image is made."""

from typing import get_args

import numpy as np
import pytest

from shuteye.config import Quantization
from shuteye.errors import UnsupportedModel
from shuteye.matrices.kinds import KINDS
from shuteye.matrices.quantize import FORMATS, kind_for, quantize
from shuteye.matrices.stored import dequantized

STEPS = {"q8_0": 1 / 127, "q4_0": 1 / 8, "q4_1": 1 / 15, "q5_0": 1 / 16, "q5_1": 1 / 31}


def test_what_can_be_asked_for_can_be_made():
    """A choice of --quantization that fails once the checkpoint was fetched."""
    assert set(get_args(Quantization)) == {"auto", "none", *FORMATS}


@pytest.mark.parametrize("format", FORMATS)
def test_numbers_are_rounded_to_the_next_step(format):
    """Rounding down, or a scale of another block: errors of more than a step, and of one sign."""
    rows = np.random.default_rng(13).normal(size=(40, 64)).astype(np.float32)
    found = dequantized(quantize(KINDS[format], rows))
    by_block = rows.reshape(40, 2, 32)
    span = np.ptp(by_block, axis=-1) if format.endswith("_1") else np.abs(by_block).max(axis=-1)
    error = (found - rows).reshape(40, 2, 32) / span[:, :, None]
    assert (
        np.abs(error).max() < (1.01 if format in ("q4_0", "q5_0") else 0.55) * STEPS[format]
    )  # their +8 does not exist
    assert np.abs(error.mean()) < 0.1 * STEPS[format]


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_and_what_is_next_to_them_are_zeros(format):
    """Infinite factors, from a division by a scale that is 0."""
    rows = np.zeros((1, 64), np.float32)
    rows[0, 32:] = 1e-42
    assert not np.any(np.abs(dequantized(quantize(KINDS[format], rows))) > 1e-7)


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e12])
def test_what_no_scale_can_hold_is_refused(value):
    """A model whose every answer is NaN, and a conversion that reported success."""
    rows = np.ones((2, 64), np.float32)
    rows[1, 40] = value
    with pytest.raises(UnsupportedModel, match="q8_0 cannot hold it"):
        quantize(KINDS["q8_0"], rows)


def test_embeddings_and_heads_keep_8_bits():
    """Four bits for the tensors in which errors are not averaged out."""
    assert kind_for("q4_0", 64, careful=True) == KINDS["q8_0"]
    assert kind_for("q4_0", 64, careful=False) == KINDS["q4_0"]
    assert kind_for("q4_0", 80, careful=False) is None
