"""Progress bars for what takes long: one per step, drawn on stderr."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

if TYPE_CHECKING:
    from shuteye.models.progress import ProgressEvent


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
