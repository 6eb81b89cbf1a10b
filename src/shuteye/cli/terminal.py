"""What commands print: results on stdout, one red line per error on stderr.

Knows nothing of what is printed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def show(renderable: object) -> None:
    """Print a line, a `Text` or a `Table`."""
    Console(soft_wrap=True, highlight=False).print(renderable)


def show_json(value: Any) -> None:
    """Print JSON for programs: nothing else, indented, never coloured."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def show_error(message: str) -> None:
    """Print one red line on stderr."""
    line = " ".join(message.split())
    Console(stderr=True, soft_wrap=True, highlight=False).print(Text(f"shuteye: {line}", style="red"))


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    """A plain table; columns whose name ends in a space are right-aligned."""
    made = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        made.add_column(column.strip(), justify="right" if column.endswith(" ") else "left", no_wrap=True)
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made
