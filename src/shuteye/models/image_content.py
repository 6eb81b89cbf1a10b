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
    if not isinstance(tensor, torch.Tensor):
        if tensor.kind == kind:
            rows, columns = part
            assert isinstance(rows, slice)
            assert isinstance(columns, slice)
            return tensor.part(rows, columns).packed().data
        tensor = torch.from_numpy(dequantized(tensor)).to(dtype)
    mine = tensor[part]  # whose columns are whole blocks of the whole, so that it may be cut before it is quantized
    if kind.is_quantized:
        return quantize(kind, mine.float().numpy()).packed().data
    return as_bytes(mine) if kind == ROWS else packed_tensor(mine, kind)


def packed_tensor(tensor: torch.Tensor, kind: MatrixKind) -> memoryview:
    """The bytes of a bfloat16 matrix in panels."""
    assert kind == BF16, f"weights are not quantized here, to {kind.name}"
    return pack_bf16(numbers_of(tensor)).data
