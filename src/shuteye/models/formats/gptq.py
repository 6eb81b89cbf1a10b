"""Modules as GPTQ's tools store them: words along the columns, scales and zero points by group.

The format: `gptqmodel.nn_modules.qlinear` of https://github.com/ModelCloud/GPTQModel. A weight is scale x (u - zero).
`qweight` is [words of columns, rows], `scales` [groups, rows], `qzeros` [groups, words of rows], `g_idx` the group of
each column. Version 1 stores each zero point less one, subtracted from whole words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from shuteye.errors import UnsupportedModel
from shuteye.models.formats.packed_integers import Facts, Module, unpacked

_VERSIONS = frozenset({"gptq", "gptq_v2"})
_ONES = {4: 0x11111111, 8: 0x01010101}


class Gptq:
    """See `IntegerFormat`."""

    MARKER: ClassVar[str] = "qweight"
    PARTS: ClassVar[frozenset[str]] = frozenset({"qweight", "qzeros", "scales", "g_idx"})

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Read a `quantization_config`.

        Raises:
            UnsupportedModel: it says what is not read.
        """
        self._bits = config.get("bits")
        self._is_symmetric = config.get("sym", True) is True
        version = config.get("checkpoint_format") or config.get("format") or "gptq"
        self._adds_one = version == "gptq"
        if version not in _VERSIONS:
            raise _not_read(f"in the format {version!r}", " or ".join(sorted(_VERSIONS)))
        if self._bits not in _ONES:
            raise _not_read(f"to {self._bits} bits", "4 or 8")
        if config.get("dynamic"):
            raise _not_read("with rules for single modules (dynamic)", "none")

    def facts(self, module: Module) -> Facts:
        """See `IntegerFormat`."""
        bits = int(self._bits or 0)
        words, rows = module.shape("qweight", dimensions=2)
        columns = words * 32 // bits
        num_groups = module.shape("scales", dimensions=2)[0]
        if not 1 <= num_groups <= columns:
            raise module.refused(f"it has {num_groups} groups of {columns} columns")
        if module.has("g_idx"):
            module.require_in_order("g_idx", columns // num_groups)
        return Facts(bits, rows, columns, columns // num_groups, module.scale_dtype("scales"), not self._is_symmetric)

    def read(self, module: Module, facts: Facts) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[np.uint8] | None]:
        """See `IntegerFormat`."""
        u = unpacked(module.read("qweight", "I32").T, facts.bits)
        scales = np.ascontiguousarray(module.scales("scales").T)
        stored = module.read("qzeros", "I32")
        if facts.has_zeros:
            words = stored.view(np.uint32) + np.uint32(_ONES[facts.bits] if self._adds_one else 0)
            return u, scales, unpacked(words.view(np.int32), facts.bits)[:, : facts.rows].T
        self._require_middle(module, unpacked(stored, facts.bits)[:, : facts.rows], 1 << facts.bits - 1)
        return u, scales, None

    def _require_middle(self, module: Module, zeros: NDArray[np.uint8], middle: int) -> None:
        """Zero points of a symmetric module, in either version: tools are known to say one and write the other."""
        if not (np.all(zeros == middle) or np.all(zeros == middle - 1)):
            raise module.refused(f"it is called symmetric (sym), and not all its zero points are {middle}")


def _not_read(what: str, expected: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"The checkpoint is quantized by GPTQ {what}, which is not read; expected {expected}. "
        "Use the unquantized checkpoint or a .gguf file."
    )
