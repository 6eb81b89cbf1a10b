"""Modules as compressed-tensors stores them: int8 as it is, int4 and int8 packed into words.

The format: `compressed_tensors.compressors` of https://github.com/vllm-project/compressed-tensors. A weight is
scale x (q - zero), q and zero signed. Packed integers have half their range added to them, and are [rows, words];
packed zero points are [words of rows, groups]. How activations were to be quantized is not followed: ours are
quantized on the way, in 8 bits and per 32 of a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from shuteye.errors import UnsupportedModel
from shuteye.models.formats.packed_integers import Facts, Module, unpacked

_FORMATS = frozenset({"pack-quantized", "int-quantized", "naive-quantized"})
_STRATEGIES = frozenset({"tensor", "channel", "group"})
_SPARSITY = frozenset({None, "dense"})


class CompressedTensors:
    """See `IntegerFormat`."""

    MARKER: ClassVar[str] = "weight_scale"
    PARTS: ClassVar[frozenset[str]] = frozenset(
        {"weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"}
        | {"input_scale", "input_zero_point", "output_scale", "output_zero_point", "q_scale", "k_scale", "v_scale"}
    )

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Read a `quantization_config`.

        Raises:
            UnsupportedModel: its weights are of other formats than those above.
        """
        sparsity = (config.get("sparsity_config") or {}).get("format")
        if sparsity not in _SPARSITY:
            raise _not_read(f"sparsity ({sparsity})", "dense")
        if (config.get("transform_config") or {}).get("config_groups"):
            raise _not_read("transforms (transform_config)", "none")
        for group in config.get("config_groups", {}).values():
            _check_group(group, str(group.get("format") or config.get("format")))

    def facts(self, module: Module) -> Facts:
        """See `IntegerFormat`."""
        is_packed = module.has("weight_packed")
        if is_packed:
            rows, columns = (int(each) for each in module.read("weight_shape", "I64"))
            words = module.shape("weight_packed", dimensions=2)[1]
            bits = {-(-columns // 8): 4, -(-columns // 4): 8}.get(words, 0)
        else:
            rows, columns = module.shape("weight", dimensions=2)
            bits = 8 if module.dtype("weight") == "I8" else 0
        if bits == 0:
            raise module.refused("its weights are neither int8 nor words of 4 or 8 bits")
        num_groups = _num_groups(module)
        if not 1 <= num_groups <= columns:
            raise module.refused(f"it has {num_groups} groups of {columns} columns")
        if module.has("weight_g_idx"):
            module.require_in_order("weight_g_idx", columns // num_groups)
        has_zeros = is_packed and bits == 4 and module.has("weight_zero_point")
        return Facts(bits, rows, columns, columns // num_groups, module.scale_dtype("weight_scale"), has_zeros)

    def read(self, module: Module, facts: Facts) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[np.uint8] | None]:
        """See `IntegerFormat`."""
        scales = module.scales("weight_scale")
        scales = np.broadcast_to(scales.reshape(-1, _num_groups(module)), (facts.rows, facts.columns // facts.group))
        if facts.has_zeros:
            zeros = unpacked(module.read("weight_zero_point", "I32").T, facts.bits).T[: facts.rows]
            return self._integers(module, facts), scales, zeros
        if (
            module.has("weight_zero_point")
            and module.read("weight_zero_point", module.dtype("weight_zero_point")).any()
        ):
            raise module.refused("it has 8 bits and zero points; only symmetric 8 bits are read")
        return self._integers(module, facts), scales, None

    def _integers(self, module: Module, facts: Facts) -> NDArray[np.uint8]:
        if module.has("weight_packed"):
            return unpacked(module.read("weight_packed", "I32"), facts.bits)[:, : facts.columns]
        signed: NDArray[np.uint8] = module.read("weight", "I8").view(np.uint8)
        return np.bitwise_xor(signed, np.uint8(0x80))


def _num_groups(module: Module) -> int:
    """Scales of a row; one scale may be of all rows."""
    if module.size("weight_scale") == 1:
        return 1
    return module.shape("weight_scale", dimensions=2)[1]


def _check_group(group: Mapping[str, Any], form: str) -> None:
    weights = group.get("weights") or {}
    if form not in _FORMATS:
        raise _not_read(f"format {form}", ", ".join(sorted(_FORMATS)))
    if weights.get("type", "int") != "int" or weights.get("num_bits") not in (4, 8):
        raise _not_read(f"{weights.get('type')} of {weights.get('num_bits')} bits", "int of 4 or 8 bits")
    if weights.get("strategy") not in _STRATEGIES:
        raise _not_read(f"strategy {weights.get('strategy')}", ", ".join(sorted(_STRATEGIES)))


def _not_read(what: str, expected: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"The checkpoint is quantized by compressed-tensors with {what}, which is not read; expected {expected}. "
        "Use the unquantized checkpoint or a .gguf file."
    )
