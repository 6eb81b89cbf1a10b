"""Parts of quantized matrices: what ranks are given."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from shuteye.matrices.kinds import kind_of
from shuteye.matrices.stored import Blocks, Groups, StoredMatrix, dequantized

RANDOM = np.random.default_rng(0)


def blocks(name: str = "q4_1") -> Blocks:
    weights = RANDOM.standard_normal((50, 128), np.float32)
    return Blocks(kind_of(name), quants.quantize(weights, GGMLQuantizationType[name.upper()]))


def groups(name: str) -> Groups:
    kind = kind_of(name)
    num_groups = 128 // (kind.group or 128)
    u = RANDOM.integers(0, 16, (50, 128), np.uint8)
    scales = RANDOM.standard_normal((50, num_groups)).astype(np.float16)
    zeros = RANDOM.integers(0, 16, (50, num_groups), np.uint8) if kind.has_zeros else None
    return Groups(kind, u, scales, zeros)


@pytest.mark.parametrize(
    "stored",
    [blocks(), groups("int4_g64_f16"), groups("int4_g32_f16_zeros"), groups("int8_row_f16")],
    ids=lambda s: s.kind.name,
)
def test_a_part_stands_for_the_same_numbers_as_those_of_the_whole(stored: StoredMatrix) -> None:
    """Would catch a scale or zero point of another group or row than the integers it goes with."""
    part = stored.part(slice(3, 40), slice(64, 128))
    assert part.shape == (37, 64)
    np.testing.assert_array_equal(dequantized(part), dequantized(stored)[3:40, 64:])


@pytest.mark.parametrize(
    "stored", [blocks(), groups("int4_g64_f16"), groups("int8_row_f16")], ids=lambda s: s.kind.name
)
def test_columns_that_are_no_whole_blocks_are_refused(stored: StoredMatrix) -> None:
    """Would catch a rank that is given half a block, whose bytes mean something else."""
    with pytest.raises(ValueError, match="no whole blocks"):
        stored.part(slice(None), slice(0, 40))
