"""The form that matrices have in an image: panels, or row after row; quantized or not. Which it is, and the bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shuteye.config import Quantization
from shuteye.matrices.kinds import BF16, ROWS, MatrixKind
from shuteye.matrices.packing import pack_bf16
from shuteye.matrices.quantize import kind_for, quantize
from shuteye.matrices.stored import StoredMatrix, dequantized
from shuteye.memory.tensor_bytes import TensorBytes
from shuteye.models.tensors import as_bytes, numbers_of
from shuteye.parallel.shards import Part


@dataclass(frozen=True, slots=True)
class ImageForm:
    """What is asked for, beside the dtype that is computed in.

    Attributes:
        quantization: as of `EngineConfig`.
        packed: bfloat16 lies in panels, as the native kernels read it; torch wants rows.
    """

    quantization: Quantization = "auto"
    packed: bool = False

    @property
    def label(self) -> str:
        """What an image's identity says of it; empty for what is usual: packed, in the checkpoint's bits."""
        asked = () if self.quantization == "auto" else (self.quantization,)
        return ".".join((*asked, *(() if self.packed else ("rows",))))

    @property
    def keeps_bits(self) -> bool:
        """Whether what the checkpoint has quantized stays so."""
        return self.quantization == "auto"

    @property
    def quantizes(self) -> bool:
        """Whether what the checkpoint has not quantized is to be."""
        return self.quantization not in ("auto", "none")

    def kind_of(self, name: str, shape: tuple[int, ...], dtype: str, stored: MatrixKind | None) -> MatrixKind:
        """The kind of a tensor of a model that the flat loop computes.

        Args:
            dtype: what is computed in.
            stored: how the checkpoint has quantized it; None if it has not.
        """
        if len(shape) != 2:
            return ROWS
        if stored is not None and self.keeps_bits:
            return stored
        wanted = kind_for(self.quantization, name, shape[1]) if self.quantizes else None
        return wanted or (BF16 if self.packed and dtype == "bfloat16" else ROWS)


AS_STORED = ImageForm()
"""In the checkpoint's bits, row after row where that is not quantized."""


def content_of(
    tensor: torch.Tensor | StoredMatrix, part: Part, kind: MatrixKind, dtype: torch.dtype
) -> TensorBytes | memoryview:
    """The bytes of a part of a checkpoint's tensor, as a slot of that kind takes them.

    Args:
        dtype: what is computed in.
    """
    if not isinstance(tensor, torch.Tensor):
        rows, columns = part
        assert isinstance(rows, slice)
        assert isinstance(columns, slice)
        if tensor.kind == kind:
            return tensor.part(rows, columns).packed().data
        tensor = torch.from_numpy(dequantized(tensor)).to(dtype)
    if kind.is_quantized:
        rows, columns = part
        assert isinstance(rows, slice)
        assert isinstance(columns, slice)
        return quantize(kind, tensor.float().numpy()).part(rows, columns).packed().data
    return as_bytes(tensor[part]) if kind == ROWS else packed_tensor(tensor[part], kind)


def packed_tensor(tensor: torch.Tensor, kind: MatrixKind) -> memoryview:
    """The bytes of a bfloat16 matrix in panels."""
    assert kind == BF16, f"weights are not quantized here, to {kind.name}"
    return pack_bf16(numbers_of(tensor)).data
