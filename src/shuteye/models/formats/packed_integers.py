"""Checkpoints whose modules keep small integers with scales, in several tensors each: what formats of these share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from shuteye.errors import UnsupportedModel
from shuteye.matrices.kinds import UNIT_COLUMNS, MatrixKind, kind_of
from shuteye.matrices.packing import as_float32
from shuteye.matrices.stored import Groups

SCALE_DTYPES = {"F32": "f32", "BF16": "bf16", "F16": "f16"}
"""What scales, and all that is not quantized, may be stored as; and how kinds of matrices call that."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a module's matrix is, as far as can be told without reading it.

    Attributes:
        group: columns that share a scale.
    """

    bits: int
    rows: int
    columns: int
    group: int
    scale_dtype: str
    has_zeros: bool


class IntegerFormat(Protocol):
    """How a quantizer stores a module, made of `quantization_config`."""

    MARKER: ClassVar[str]
    """The tensor that quantized modules have, and others have not."""

    PARTS: ClassVar[frozenset[str]]
    """All tensors that belong to the matrix; others, such as a bias, are the module's own."""

    def facts(self, module: Module) -> Facts:
        """What the module's matrix is; raises `UnsupportedModel` if it cannot be kept."""
        ...

    def read(self, module: Module, facts: Facts) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[np.uint8] | None]:
        """Integers [rows, columns], scales and, if it has any, zero points [rows, groups]."""
        ...


@dataclass(frozen=True, slots=True)
class Module:
    """The tensors of one module in open safetensors files."""

    directory: Path
    name: str
    files: Mapping[str, Any] = field(repr=False)

    def has(self, part: str) -> bool:
        """Whether there is a tensor of that name."""
        return f"{self.name}.{part}" in self.files

    def shape(self, part: str, *, dimensions: int) -> tuple[int, ...]:
        """A tensor's shape; refused if it has another number of dimensions."""
        shape = tuple(self._slice(part).get_shape())
        if len(shape) != dimensions:
            raise self.refused(f"{part} has the shape {shape}, expected {dimensions} dimensions")
        return shape

    def size(self, part: str) -> int:
        """How many numbers a tensor has."""
        return prod(self._slice(part).get_shape())

    def dtype(self, part: str) -> str:
        """How a tensor is stored, as safetensors says it."""
        return str(self._slice(part).get_dtype())

    def read(self, part: str, dtype: str) -> NDArray[Any]:
        """A tensor's numbers, of bfloat16 the bits; refused if it is stored otherwise."""
        if self.dtype(part) != dtype:
            raise self.refused(f"{part} is stored as {self.dtype(part)}, expected {dtype}")
        return _as_numpy(self.files[f"{self.name}.{part}"].get_tensor(f"{self.name}.{part}"))

    def scale_dtype(self, part: str) -> str:
        """How scales are stored; refused if not as floats."""
        if self.dtype(part) not in SCALE_DTYPES:
            raise self.refused(f"{part} is stored as {self.dtype(part)}, expected one of {', '.join(SCALE_DTYPES)}")
        return SCALE_DTYPES[self.dtype(part)]

    def scales(self, part: str) -> NDArray[Any]:
        """Numbers that are all finite, of bfloat16 the bits."""
        found = self.read(part, self.dtype(part))
        bits = found.view(np.uint32 if found.itemsize == 4 else np.uint16)
        if not np.isfinite(as_float32(bits, self.scale_dtype(part))).all():
            raise self.refused(f"{part} has numbers that are infinite, or none")
        return found

    def require_in_order(self, part: str, group: int) -> None:
        """Refuse columns whose scales are not those of the group that they lie in (act-order, `desc_act`)."""
        found = self.read(part, "I32")
        if not np.array_equal(found, np.arange(len(found)) // group):
            raise self.refused(
                f"{part} puts columns that do not lie together into one group (act-order), which is not read; use a "
                "checkpoint that was quantized without it"
            )

    def refused(self, what: str) -> UnsupportedModel:
        """The error for a module that cannot be kept as it is."""
        return UnsupportedModel(f"{self.directory}: {self.name} cannot be read: {what}.")

    def _slice(self, part: str) -> Any:
        name = f"{self.name}.{part}"
        if name not in self.files:
            raise self.refused(f"it has no {part}")
        return self.files[name].get_slice(name)


def _as_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    bits = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    found: NDArray[Any] = bits.numpy()
    return found


def read_floats(files: Mapping[str, Any], name: str) -> NDArray[np.float32]:
    """A tensor that is not quantized."""
    tensor: torch.Tensor = files[name].get_tensor(name)
    found: NDArray[np.float32] = tensor.float().numpy()
    return found


def matrix_kind(module: Module, facts: Facts) -> MatrixKind:
    """The kind of a module's matrix.

    Raises:
        UnsupportedModel: there is none for it.
    """
    if facts.bits not in (4, 8):
        raise module.refused(f"it has {facts.bits} bits, expected 4 or 8")
    if facts.bits == 8 and facts.has_zeros:
        raise module.refused("it has 8 bits and zero points; only symmetric 8 bits are read")
    if facts.columns % UNIT_COLUMNS or facts.group % UNIT_COLUMNS or facts.columns % facts.group:
        raise module.refused(f"groups of {facts.group} of {facts.columns} columns, expected a multiple of 32 that fits")
    group = "row" if facts.group == facts.columns else f"g{facts.group}"
    return kind_of(f"int{facts.bits}_{group}_{facts.scale_dtype}{'_zeros' if facts.has_zeros else ''}")


def read_groups(form: IntegerFormat, module: Module) -> Groups:
    """A module's matrix."""
    facts = form.facts(module)
    u, scales, zeros = form.read(module, facts)
    num_groups = facts.columns // facts.group
    for what, array, columns in (
        ("integers", u, facts.columns),
        ("scales", scales, num_groups),
        ("zeros", zeros, num_groups),
    ):
        if array is not None and array.shape != (facts.rows, columns):
            raise module.refused(f"its {what} are {array.shape}, expected {(facts.rows, columns)}")
    return Groups(matrix_kind(module, facts), u, scales, zeros)


def unpacked(words: NDArray[np.int32], bits: int) -> NDArray[np.uint8]:
    """Integers of 4 or 8 bits, lowest first in words [rows, words] → [rows, words x (32 / bits)]."""
    packed = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return packed
    u = np.empty((*packed.shape, 2), np.uint8)
    u[..., 0], u[..., 1] = packed & np.uint8(0x0F), packed >> np.uint8(4)
    return u.reshape(len(packed), -1)
