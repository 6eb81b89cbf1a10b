"""What commands print, and how: lines, tables, JSON for programs, errors in one line.

rich is imported by whoever prints something: a server that starts need not wait for it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.text import Text


def show(renderable: object) -> None:
    """Print a line or a `Text`; what is too wide for the terminal is not cut."""
    from rich.console import Console

    Console(soft_wrap=True, highlight=False).print(renderable)


def show_json(value: Any) -> None:
    """Print JSON for programs: nothing else, indented, never coloured."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def show_error(message: str) -> None:
    """Print one red line on stderr."""
    _complain(message, style="red")


def show_warning(message: str) -> None:
    """Print one yellow line on stderr."""
    _complain(f"warning: {message}", style="yellow")


def _complain(message: str, *, style: str) -> None:
    from rich.console import Console
    from rich.text import Text

    line = " ".join(message.split())
    Console(stderr=True, soft_wrap=True, highlight=False).print(Text(f"shuteye: {line}", style=style))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Text:
    """Aligned columns that are never cut, so that keys can be copied; names that end in a space align to the right."""
    from rich.text import Text

    lines = [[column.strip() for column in columns], *map(list, rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    texts = [
        "  ".join(
            cell.rjust(width) if column.endswith(" ") else cell.ljust(width)
            for column, cell, width in zip(columns, line, widths, strict=True)
        ).rstrip()
        for line in lines
    ]
    return Text("\n").join([Text(texts[0], style="bold"), *map(Text, texts[1:])])
