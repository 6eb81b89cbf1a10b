"""bfloat16 as the upper half of a float32, for numpy, which does not know it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[Any]
"""Of a model's dtype: float32, or bfloat16 as uint16."""


def bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The nearest bfloat16 of finite numbers, ties to even."""
    bits = values.view(np.uint32)
    rounded: NDArray[np.uint16] = ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype(np.uint16)
    return rounded


def float32_of(numbers: Numbers) -> NDArray[np.float32]:
    """The same numbers as float32."""
    if numbers.dtype == np.float32:
        return numbers
    wide: NDArray[np.float32] = (numbers.astype(np.uint32) << 16).view(np.float32)
    return wide
