"""The tensors of a checkpoint whose matrices are quantized, under the names that transformers' modules have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shuteye.matrices.kinds import MatrixKind
from shuteye.matrices.stored import StoredMatrix

HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class QuantizedTensors:
    """What a checkpoint holds; nothing is read before it is asked for.

    Attributes:
        matrices: the quantized ones: what they are once packed, [rows, columns].
        floats: all others, by shape.
        read: gives one, either as it is stored or as float32; raises `UnsupportedModel` if it is damaged.
        rope_factors: what each rotary frequency is to be divided by [head_dim / 2]; None: they are the config's.
    """

    matrices: Mapping[str, tuple[MatrixKind, tuple[int, int]]]
    floats: Mapping[str, tuple[int, ...]]
    read: Callable[[str], StoredMatrix | NDArray[np.float32]]
    rope_factors: NDArray[np.float32] | None = None

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embedding."""
        return HEAD not in self.matrices and HEAD not in self.floats
