"""A checkpoint's tensor as the bytes that its slot in an image takes: cast, cut, packed or quantized."""

from __future__ import annotations

import torch

from shuteye.matrices.kinds import BF16, ROWS, MatrixKind
from shuteye.matrices.packing import pack_bf16
from shuteye.matrices.quantize import quantize
from shuteye.matrices.stored import StoredMatrix, dequantized
from shuteye.memory.tensor_bytes import TensorBytes
from shuteye.models.tensors import as_bytes, numbers_of
from shuteye.parallel.shards import Part


def content_of(
    tensor: torch.Tensor | StoredMatrix, part: Part, kind: MatrixKind, dtype: torch.dtype
) -> TensorBytes | memoryview:
    """The bytes of a part of a checkpoint's tensor, as a slot of that kind takes them.

    Args:
        dtype: what is computed in.
    """
    if not isinstance(tensor, torch.Tensor) and tensor.kind != kind:
        tensor = torch.from_numpy(dequantized(tensor)).to(dtype)
    if isinstance(tensor, torch.Tensor) and not kind.is_quantized:
        return as_bytes(tensor[part]) if kind == ROWS else packed_tensor(tensor[part], kind)
    stored = quantize(kind, tensor.float().numpy()) if isinstance(tensor, torch.Tensor) else tensor
    rows, columns = part
    assert isinstance(rows, slice)
    assert isinstance(columns, slice)
    return stored.part(rows, columns).packed().data


def packed_tensor(tensor: torch.Tensor, kind: MatrixKind) -> memoryview:
    """The bytes of a bfloat16 matrix in panels."""
    assert kind == BF16, f"weights are not quantized here, to {kind.name}"
    return pack_bf16(numbers_of(tensor)).data
