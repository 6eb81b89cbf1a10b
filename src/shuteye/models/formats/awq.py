"""Modules as AutoAWQ stores them (`gemm`): words along the rows, in an order of their own.

The format: `awq.modules.linear.gemm` of https://github.com/casper-hansen/AutoAWQ. A weight is scale x (u - zero).
`qweight` is [columns, words of rows], `scales` [groups, rows], `qzeros` [groups, words of rows].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from shuteye.errors import UnsupportedModel
from shuteye.models.formats.packed_integers import Facts, Module

_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word the rows 0 to 7 are."""


class Awq:
    """See `IntegerFormat`."""

    MARKER: ClassVar[str] = "qweight"
    PARTS: ClassVar[frozenset[str]] = frozenset({"qweight", "qzeros", "scales"})

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Read a `quantization_config`.

        Raises:
            UnsupportedModel: it says what is not read.
        """
        version = str(config.get("version") or config.get("format") or "gemm").lower()
        if version != "gemm" or config.get("backend") == "llm-awq":
            raise _not_read(f"in the format {config.get('backend') or version!r}", "gemm")
        if config.get("zero_point", True) is not True:
            raise _not_read("without zero points", "zero_point")
        if config.get("bits", config.get("w_bit", 4)) != 4:
            raise _not_read(f"to {config.get('bits', config.get('w_bit'))} bits", "4")

    def facts(self, module: Module) -> Facts:
        """See `IntegerFormat`."""
        columns, words = module.shape("qweight", dimensions=2)
        num_groups, rows = module.shape("scales", dimensions=2)
        if rows != words * 8 or not 1 <= num_groups <= columns:
            raise module.refused(f"{num_groups} groups of {rows} rows do not fit its weights [{columns}, {words}]")
        return Facts(4, rows, columns, columns // num_groups, module.scale_dtype("scales"), module.has("qzeros"))

    def read(self, module: Module, facts: Facts) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[np.uint8] | None]:
        """See `IntegerFormat`."""
        scales = np.ascontiguousarray(module.scales("scales").T)
        zeros = _rows(module.read("qzeros", "I32")) if facts.has_zeros else None
        return _rows(module.read("qweight", "I32")), scales, zeros


def _rows(words: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Words [columns, words of rows] → integers [rows, columns]."""
    by_row = np.ascontiguousarray(words.T).view(np.uint32)
    u = np.empty((len(by_row), 8, by_row.shape[1]), np.uint8)
    for row, place in enumerate(_ORDER):
        u[:, row] = by_row >> np.uint32(4 * place) & np.uint32(0x0F)
    return u.reshape(-1, by_row.shape[1])


def _not_read(what: str, expected: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"The checkpoint is quantized by AWQ {what}, which is not read; expected {expected}. "
        "Use the unquantized checkpoint or a .gguf file."
    )
