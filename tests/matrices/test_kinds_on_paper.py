"""docs/matrices.md says of every kind what the table of kinds says."""

from pathlib import Path

import pytest

from shuteye.matrices.kinds import KINDS, kind_of

PAGE = Path(__file__).parents[2] / "docs" / "matrices.md"
HEADER = "| kind | number |"


def table():
    """Cells of the table of kinds, by name."""
    lines = PAGE.read_text().splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith(HEADER)) + 2
    found = {}
    for line in lines[first:]:
        if not line.startswith("|"):
            return found
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        found[name.strip("`")] = cells
    return found


def test_every_kind_is_on_the_page():
    """A kind that others cannot write a kernel for, because its bytes are nowhere."""
    assert set(KINDS) <= set(table())


@pytest.mark.parametrize("name", sorted(table().keys() - {"rows", "int8_row_f32"}))
def test_the_page_has_its_bytes(name):
    """A page that was right once, by which a kernel is written that reads past its block."""
    kind = kind_of(name)
    number, panel_rows, block_columns, nbytes, bits = table()[name]
    columns = int(block_columns)
    assert (int(number), int(panel_rows)) == (kind.number, kind.panel_rows)
    assert columns == (kind.group or kind.block_columns)
    assert int(nbytes) == kind.nbytes((kind.panel_rows, columns), "bfloat16")
    assert float(bits) == kind.bits_per_weight(columns)
