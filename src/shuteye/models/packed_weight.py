"""Quantized matrices as parameters of transformers' modules: products and embeddings are computed from their blocks.

Modules need not know: whoever calls `torch.nn.functional.linear` or `embedding` with such a parameter, as `nn.Linear`
and every kind of `nn.Embedding` do, calls the torch operations that are registered here. What else a module may want of
a weight is refused, as there are no numbers to give. Which parameters can be held so, `models/quantizable.py` says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from shuteye.errors import UnsupportedModel
from shuteye.matrices.kinds import MatrixKind, kind_of
from shuteye.matrices.matrix import Matrix
from shuteye.memory.arena import Arena
from shuteye.memory.layout import Slot
from shuteye.models.matrix_product import Product
from shuteye.models.tensors import dtype_name, over, torch_dtype
from shuteye.native import available

_LIBRARY: Any = torch.library.Library("shuteye", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define("linear(Tensor x, Tensor memory, Tensor? bias, *, str kind, int rows, bool native) -> Tensor")
_LIBRARY.define(
    "embedding(Tensor token_ids, Tensor memory, *, str kind, int rows, int columns, ScalarType dtype, bool native)"
    " -> Tensor"
)


def _linear(x: Tensor, memory: Tensor, bias: Tensor | None, *, kind: str, rows: int, native: bool) -> Tensor:
    """[..., columns] → [..., rows]; `memory` is the matrix's bytes, `bias` of the dtype of `x`."""
    columns = x.shape[-1]
    at = 0 if bias is None else bias.data_ptr()
    matrix = Matrix(kind_of(kind), rows, columns, dtype_name(x.dtype), memory.data_ptr(), at)
    assert matrix.nbytes == memory.numel(), f"{matrix} has {matrix.nbytes} bytes, got {memory.numel()}"
    found = Product(matrix, native=native)(x.reshape(-1, columns))
    return found.view(*x.shape[:-1], rows)


def _linear_on_meta(x: Tensor, _memory: Tensor, _bias: Tensor | None, *, rows: int, **_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def _embedding(
    token_ids: Tensor, memory: Tensor, *, kind: str, rows: int, columns: int, dtype: torch.dtype, native: bool
) -> Tensor:
    """Int [...] → [..., columns] of `dtype`."""
    matrix = Matrix(kind_of(kind), rows, columns, dtype_name(dtype), memory.data_ptr())
    assert matrix.nbytes == memory.numel(), f"{matrix} has {matrix.nbytes} bytes, got {memory.numel()}"
    found = Product(matrix, native=native).embed(token_ids.reshape(-1).long())
    return found.view(*token_ids.shape, columns)


def _embedding_on_meta(token_ids: Tensor, _memory: Tensor, *, columns: int, dtype: torch.dtype, **_: object) -> Tensor:
    return token_ids.new_empty((*token_ids.shape, columns), dtype=dtype)


_LIBRARY.impl("linear", _linear, "CPU")
_LIBRARY.impl("linear", _linear_on_meta, "Meta")
_LIBRARY.impl("embedding", _embedding, "CPU")
_LIBRARY.impl("embedding", _embedding_on_meta, "Meta")


class PackedWeight(Tensor):
    """A quantized matrix [rows, columns] where it lies; to torch, a parameter of the dtype that is computed in.

    Attributes:
        memory: its bytes, uint8.
        native: whether the native kernels may be used; without them it is unpacked by every call.
    """

    memory: Tensor
    kind: MatrixKind
    native: bool

    @staticmethod
    def of_memory(
        memory: Tensor, kind: MatrixKind, shape: Sequence[int], dtype: torch.dtype, *, native: bool
    ) -> PackedWeight:
        """The matrix [rows, columns] whose bytes `memory` is."""
        found: Any = Tensor._make_wrapper_subclass(PackedWeight, tuple(shape), dtype=dtype, device=memory.device)
        found.memory, found.kind, found.native = memory, kind, native
        found._is_param = True  # what `nn.Parameter` looks for; its own constructor would copy
        return found  # type: ignore[no-any-return]

    @classmethod
    def of_slot(cls, arena: Arena, slot: Slot, *, native: bool) -> PackedWeight:
        """The weight in a layout's slot of a quantized kind; `native` where there is a native library."""
        memory = over(arena.bytes_view(slot.offset, slot.nbytes), (slot.nbytes,), "uint8")
        is_native = native and available()
        return cls.of_memory(memory, slot.matrix_kind, slot.shape, torch_dtype(slot.dtype), native=is_native)

    def rows(self, first: int, end: int) -> PackedWeight:
        """Rows [first, end), of which the first begins a panel, as a weight that shares the memory."""
        rows, columns = self.shape
        part = Matrix(self.kind, rows, columns, dtype_name(self.dtype), 0).part(first, end)
        memory = self.memory[part.address : part.address + part.nbytes]
        return self.of_memory(memory, self.kind, (part.rows, columns), self.dtype, native=self.native)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """What modules may do with a weight."""
        if func in _COMPUTED:
            return _COMPUTED[func](*args, **(kwargs or {}))
        if func in _TOLD:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise UnsupportedModel(
            f"The model puts a weight that is held quantized to another use than in products ({_title(func)}). Serve "
            "it with --quantization none.",
            param="quantization",
        )

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Nothing gets here but what `__torch_function__` has let pass by mistake."""
        raise AssertionError(f"{func} was asked of a quantized weight")


def _multiplied(input: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, which wants equal dtypes as well."""
    if not isinstance(weight, PackedWeight) or input.dtype != weight.dtype or input.shape[-1] != weight.shape[1]:
        raise UnsupportedModel(
            f"The model multiplies {input.dtype} {tuple(input.shape)} with a quantized weight of {weight.dtype} "
            f"{tuple(weight.shape)}. Serve it with --quantization none.",
            param="quantization",
        )
    found: Tensor = torch.ops.shuteye.linear(
        input, weight.memory, bias, kind=weight.kind.name, rows=weight.shape[0], native=weight.native
    )
    return found


def _looked_up(input: Tensor, weight: Any, padding_idx: int | None = None, *_: Any, **__: Any) -> Tensor:
    """`torch.nn.functional.embedding` without what is for training alone.

    Raises:
        IndexError: a token that there is no row of, as torch's own.
    """
    rows, columns = weight.shape
    if input.numel() and not input.is_meta and not 0 <= int(input.min()) <= int(input.max()) < rows:
        raise IndexError(f"tokens from {int(input.min())} to {int(input.max())}, of {rows}")
    found: Tensor = torch.ops.shuteye.embedding(
        input,
        weight.memory,
        kind=weight.kind.name,
        rows=rows,
        columns=columns,
        dtype=weight.dtype,
        native=weight.native,
    )
    return found


_COMPUTED: Mapping[Any, Callable[..., Tensor]] = {functional.linear: _multiplied, functional.embedding: _looked_up}

_TOLD = frozenset({
    *(getattr(Tensor, name).__get__ for name in ("dtype", "device", "shape", "ndim", "layout", "is_meta", "is_leaf")),
    *(getattr(Tensor, name).__get__ for name in ("requires_grad", "grad", "grad_fn", "is_cuda", "is_quantized")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.element_size, Tensor.is_floating_point, Tensor.requires_grad_),
})  # fmt: skip
"""Facts of a weight that are true of a quantized one."""


def _title(func: Callable[..., Any]) -> str:
    return str(getattr(func, "__qualname__", None) or getattr(func, "__name__", func))
