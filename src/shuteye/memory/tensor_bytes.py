"""A tensor as bytes with a name for its numbers: how tensors reach images and leave them. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from shuteye.memory.layout import tensor_nbytes


@dataclass(frozen=True, slots=True)
class TensorBytes:
    """A dense tensor, row-major.

    Attributes:
        dtype: one of `layout.DTYPE_NBYTES`.
        content: its bytes; memory of whoever made it.
    """

    shape: tuple[int, ...]
    dtype: str
    content: memoryview

    def __post_init__(self) -> None:
        expected = tensor_nbytes(self.shape, self.dtype)
        assert self.content.nbytes == expected, f"{self.dtype} {self.shape} has {expected} bytes, got {self.content}"

    def same_as(self, other: TensorBytes) -> bool:
        """Whether shape, dtype and every bit agree."""
        return (self.shape, self.dtype, self.content) == (other.shape, other.dtype, other.content)
