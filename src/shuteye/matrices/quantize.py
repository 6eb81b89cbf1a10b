"""Numbers into quantized blocks, for checkpoints that are not quantized: which matrices, into which kind, and how."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shuteye.errors import UnsupportedModel
from shuteye.matrices.ggml import is_finite
from shuteye.matrices.kinds import KINDS, MatrixKind
from shuteye.matrices.stored import Blocks

FORMATS = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1")
"""What matrices can be quantized to: what `gguf.quants.quantize` makes, and kernels read."""


def kind_for(format: str, columns: int, *, careful: bool) -> MatrixKind | None:
    """What a matrix becomes when a checkpoint is quantized to `format`; None: it stays as it is.

    Args:
        careful: it is an embedding or a head, which are never quantized to less than 8 bits: each of their rows is a
            token's own, and what is lost there is not made good by other columns.
    """
    kind = KINDS["q8_0" if careful else format]
    return kind if kind.fits(columns) else None


def quantize(kind: MatrixKind, rows: NDArray[np.float32]) -> Blocks:
    """The blocks that llama.cpp would make of a matrix [rows, columns], by its own Python package.

    Raises:
        UnsupportedModel: it has numbers that are infinite, or none, or too large for a float16 scale.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize as quantized

    with np.errstate(all="ignore"):  # a block of numbers next to 0 is divided by 0, and stands for zeros
        blocks = quantized(rows, GGMLQuantizationType[kind.name.upper()])
    if not is_finite(kind.name, blocks):
        raise UnsupportedModel(
            f"A matrix has numbers that are too large, infinite or no numbers: {kind.name} cannot hold it. "
            "Serve the checkpoint with --quantization none."
        )
    return Blocks(kind, blocks)
