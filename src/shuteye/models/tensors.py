"""Torch tensors over what `memory/` knows as bytes: views of arenas, and tensors on their way to and from images."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shuteye.matrices.bfloat16 import Numbers
from shuteye.memory.arena import Arena
from shuteye.memory.image import WeightImage
from shuteye.memory.layout import DTYPE_NBYTES, Slot, tensor_nbytes
from shuteye.memory.tensor_bytes import TensorBytes

_TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NBYTES}
_DTYPE_NAMES = {dtype: name for name, dtype in _TORCH_DTYPES.items()}


def torch_dtype(name: str) -> torch.dtype:
    """PyTorch's dtype of that name, such as `bfloat16`."""
    return _TORCH_DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """The name that layouts use for PyTorch's dtype."""
    return _DTYPE_NAMES[dtype]


def use_torch_threads(count: int) -> None:
    """Let torch compute on `count` threads: for models that it computes."""
    torch.set_num_threads(count)


def arena_view(arena: Arena, offset: int, shape: Sequence[int], dtype: str) -> torch.Tensor:
    """A dense tensor over an arena's bytes from `offset`. It owns nothing, and keeps only the addresses alive."""
    return over(arena.bytes_view(offset, tensor_nbytes(shape, dtype)), shape, dtype)


def slot_view(arena: Arena, slot: Slot) -> torch.Tensor:
    """The tensor of a layout's slot."""
    return arena_view(arena, slot.offset, slot.shape, slot.dtype)


def over(content: memoryview, shape: Sequence[int], dtype: str) -> torch.Tensor:
    """A tensor over writable bytes, which it keeps alive."""
    if content.nbytes == 0:
        return torch.empty(tuple(shape), dtype=torch_dtype(dtype))
    return torch.frombuffer(content, dtype=torch_dtype(dtype)).view(tuple(shape))


def numbers_of(tensor: torch.Tensor) -> Numbers:
    """The same memory as numpy's: float32, or the bits of bfloat16."""
    numbers: Numbers = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return numbers


def tensor_of(numbers: Numbers) -> torch.Tensor:
    """The same memory as torch's; the inverse of `numbers_of`."""
    tensor = torch.from_numpy(numbers)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


def as_bytes(tensor: torch.Tensor) -> TensorBytes:
    """A tensor as images take it; shares its memory where that is dense and on the CPU."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    content = flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
    return TensorBytes(tuple(tensor.shape), dtype_name(tensor.dtype), content)


def buffers_of(image: WeightImage) -> dict[str, torch.Tensor]:
    """The persistent buffers of an image, by name, as tensors of their own.

    Raises:
        ImageFailure: the file is missing or damaged.
    """
    return {name: over(kept.content, kept.shape, kept.dtype) for name, kept in image.read_buffers().items()}
