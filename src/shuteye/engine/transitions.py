"""A control call between its arrival and its answer.

Knows nothing of what the calls do.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from shuteye.engine.messages import ControlCall
from shuteye.errors import ShuteyeError
from shuteye.state import SleepReport, UpdateReport, WakeReport

Report = SleepReport | WakeReport | UpdateReport | list[Any] | None
Steps = Generator[None, None, Report]
"""A transition under way: each `next` is one look whether it can go on; the return value is its report."""


@dataclass(slots=True)
class Transition:
    """A control call on its way: waiting, under way (`steps`), or answered through `answer`."""

    call: ControlCall
    answer: Callable[[Report | ShuteyeError], None]
    steps: Steps | None = None
