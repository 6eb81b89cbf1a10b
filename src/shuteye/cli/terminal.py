"""What commands print, and how: sizes and times as people write them, errors in one line, progress bars."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

if TYPE_CHECKING:
    from shuteye.models.progress import ProgressEvent


def show(renderable: object) -> None:
    """Print a line or a `Text`; what is too wide for the terminal is not cut."""
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
    line = " ".join(message.split())
    Console(stderr=True, soft_wrap=True, highlight=False).print(Text(f"shuteye: {line}", style=style))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Text:
    """Aligned columns that are never cut, so that keys can be copied; names that end in a space align to the right."""
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


_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", start=1)}
_UNITS |= {letter: 1024**power for power, letter in enumerate("kmgt", start=1)}  # as docker and systemd read them

_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?(?:e\+?\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes from `512MiB`, `2GiB`, `1.5GB`, `64M`, `1e9` or `1073741824`.

    Raises:
        ValueError: it is none of these, or no whole number of bytes.
    """
    match = _SIZE.fullmatch(text.replace("_", ""))
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ValueError(f"{text!r} is not a size; write it as 512MiB, 2GiB, 1.5GB, 1e9 or plain bytes.")
    nbytes = float(match[1]) * unit
    if not nbytes.is_integer():
        raise ValueError(f"{text!r} is {nbytes} bytes, which is not a whole number.")
    return int(nbytes)


def parse_integer(text: str) -> int:
    """An integer in digits, which may have `_` between them, or in Python's notation for hex, octal and binary.

    Raises:
        ValueError: it is none; nothing is rounded.
    """
    try:
        return int(text) if text.strip("+-0123456789_ ") == "" else int(text, base=0)
    except ValueError as error:
        raise ValueError(f"{text!r} is not an integer.") from error


def format_size(nbytes: int) -> str:
    """Bytes as MiB, or as what they are below one of them."""
    if nbytes < 1024:
        return f"{nbytes} B"
    if nbytes < 1024**2:
        return f"{nbytes / 1024:.1f} KiB"
    return f"{nbytes / 1024**2:,.1f} MiB"


def format_seconds(seconds: float) -> str:
    """Milliseconds below ten seconds, seconds above."""
    return f"{seconds * 1000:,.1f} ms" if seconds < 10 else f"{seconds:,.1f} s"


class _Amount(DownloadColumn):
    """Bytes done and to do; nothing for a step that cannot count them."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.fields["counts"] else Text()


class ProgressBars:
    """One bar per step, on stderr; on a pipe, nothing is drawn."""

    def __init__(self, console: Console | None = None) -> None:
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            _Amount(binary_units=True),
            TimeElapsedColumn(),
            console=console or Console(stderr=True),
        )
        self._current: TaskID | None = None

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()

    def __call__(self, event: ProgressEvent) -> None:
        """Draw what a step tells; why one failed stays beside what it was to be."""
        from shuteye.models.progress import Advanced, Failed, Finished, Started  # other commands start without msgspec

        match event:
            case Started(label, total):
                self._current = self._bars.add_task(label, total=total, counts=total is not None)
            case Advanced(nbytes):
                assert self._current is not None, "a step advances before it starts"
                self._bars.advance(self._current, nbytes)
            case Finished():
                self._end("")
            case Failed(reason):
                self._end(f": failed, {reason}")

    def _end(self, remark: str) -> None:
        assert self._current is not None, "a step ends before it starts"
        task = next(task for task in self._bars.tasks if task.id == self._current)
        done = max(task.completed if task.total is None or remark else task.total, 1)
        self._bars.update(self._current, total=done, completed=done, description=f"{task.description}{remark}")
        self._current = None
