"""The form that matrices have in an image: panels, or row after row; quantized or not. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from shuteye.config import Quantization
from shuteye.matrices.kinds import BF16, ROWS, MatrixKind
from shuteye.matrices.quantize import kind_for


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

    def kind_of(
        self, shape: tuple[int, ...], dtype: str, stored: MatrixKind | None, *, careful: bool, packed: bool
    ) -> MatrixKind:
        """The kind of a tensor.

        Args:
            dtype: what is computed in.
            stored: how the checkpoint has quantized it; None if it has not.
            careful: it is an embedding or a head, which are never quantized to less than 8 bits.
            packed: whether its model reads panels that are not quantized, if this form has any.
        """
        if len(shape) != 2:
            return ROWS
        if stored is not None and self.keeps_bits:
            return stored
        wanted = kind_for(self.quantization, shape[1], careful=careful) if self.quantizes else None
        return wanted or (BF16 if packed and self.packed and dtype == "bfloat16" else ROWS)


AS_STORED = ImageForm()
"""In the checkpoint's bits, row after row where that is not quantized."""
