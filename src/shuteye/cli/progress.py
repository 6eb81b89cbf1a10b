"""Draws how far a download or conversion is.

Knows nothing of what is downloaded; `models.progress.Progress` is the seam.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text


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

    def start(self, label: str, total: int | None) -> None:
        """A step begins; `total` is in bytes, or None if unknown."""
        self._current = self._bars.add_task(label, total=total, counts=total is not None)

    def advance(self, amount: int) -> None:
        """`amount` more bytes of the current step are done."""
        assert self._current is not None, "advance() before start()"
        self._bars.advance(self._current, amount)

    def finish(self) -> None:
        """The current step is done, whatever its total was said to be."""
        self._end("")

    def fail(self, reason: str) -> None:
        """The current step came to nothing; the reason stays beside what it was to be."""
        self._end(f": failed, {reason}")

    def _end(self, remark: str) -> None:
        assert self._current is not None, "the end of a step before start()"
        task = next(task for task in self._bars.tasks if task.id == self._current)
        done = max(task.completed if task.total is None or remark else task.total, 1)
        self._bars.update(self._current, total=done, completed=done, description=f"{task.description}{remark}")
        self._current = None
