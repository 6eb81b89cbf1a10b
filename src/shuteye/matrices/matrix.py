"""A weight matrix where it lies in memory. Only addresses: whether that memory is resident is for others to see to."""

from __future__ import annotations

from dataclasses import dataclass, replace

from shuteye.matrices.kinds import MatrixKind


@dataclass(frozen=True, slots=True)
class Matrix:
    """y = x @ W.T + bias, W [rows, columns].

    Attributes:
        dtype: of the model: of a matrix of kind `rows`, and of the bias.
        bias: its address; 0: there is none.
    """

    kind: MatrixKind
    rows: int
    columns: int
    dtype: str
    address: int
    bias: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes in memory, without the bias."""
        return self.kind.nbytes((self.rows, self.columns), self.dtype)

    def part(self, first_row: int, end_row: int) -> Matrix:
        """Rows [first_row, end_row), which begin with a panel; without a bias."""
        assert first_row % self.kind.panel_rows == 0, f"row {first_row} is within a panel of {self.kind.panel_rows}"
        moved = self.kind.nbytes((first_row, self.columns), self.dtype)
        return replace(self, rows=end_row - first_row, address=self.address + moved, bias=0)
