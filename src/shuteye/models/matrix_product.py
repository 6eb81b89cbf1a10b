"""Products with a matrix of any kind for torch: by torch where it lies row after row, else natively or unpacked."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

from shuteye.matrices.ggml import Bytes
from shuteye.matrices.kinds import ROWS
from shuteye.matrices.matrix import Matrix
from shuteye.matrices.packing import unpack, unpack_rows
from shuteye.models.tensors import over, torch_dtype
from shuteye.native import kernels


def memory_at(address: int, nbytes: int) -> memoryview:
    """Memory that somebody else holds."""
    return memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B")


def vector_at(address: int | None, size: int, dtype: str) -> Tensor | None:
    """A norm or a bias; None if there is none."""
    return over(memory_at(address, size * torch_dtype(dtype).itemsize), (size,), dtype) if address else None


class Product:
    """One matrix: `x @ W.T + bias`, and its rows as embeddings. Valid while its memory is resident.

    Args:
        native: whether the native kernels may be used; without them a packed matrix is unpacked by every call.
    """

    def __init__(self, matrix: Matrix, *, native: bool) -> None:
        self._matrix = matrix
        self._native = native
        memory = memory_at(matrix.address, matrix.nbytes)
        is_rows = matrix.kind == ROWS
        self._rows = over(memory, (matrix.rows, matrix.columns), matrix.dtype) if is_rows else None
        self._memory: Bytes = np.frombuffer(memory, np.uint8)
        self._bias = vector_at(matrix.bias, matrix.rows, matrix.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """[num_tokens, columns] → [num_tokens, rows], of the dtype of `x`."""
        if self._rows is not None:
            return linear(x, self._rows, self._bias)
        matrix = self._matrix
        if self._native:
            out = torch.empty((len(x), matrix.rows), dtype=x.dtype)
            return kernels.linear(x.contiguous(), matrix, None, out)
        weights = torch.from_numpy(unpack(matrix.kind, self._memory, matrix.rows, matrix.columns))
        bias = None if self._bias is None else self._bias.float()
        return linear(x.float(), weights, bias).to(x.dtype)

    def embed(self, token_ids: Tensor) -> Tensor:
        """int64 [num_tokens] → its rows [num_tokens, columns]."""
        if self._rows is not None:
            return embedding(token_ids, self._rows)
        matrix = self._matrix
        if self._native:
            out = torch.empty((len(token_ids), matrix.columns), dtype=torch_dtype(matrix.dtype))
            return kernels.embed(token_ids, matrix, out)
        rows = unpack_rows(matrix.kind, self._memory, matrix.rows, matrix.columns, token_ids.numpy())
        return torch.from_numpy(rows).to(torch_dtype(matrix.dtype))
