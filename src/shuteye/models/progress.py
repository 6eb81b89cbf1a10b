"""What long-running steps tell of how far they are, and how a log shows it.

The command line draws it, another process passes it on, tests record it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import msgspec

LOG_EVERY_S = 5.0

logger = logging.getLogger(__name__)


class Started(msgspec.Struct, frozen=True, tag=True):
    """A step begins; `total` is in bytes, or None if it cannot be known. A new start ends the last step."""

    label: str
    total: int | None = None


class Advanced(msgspec.Struct, frozen=True, tag=True):
    """`nbytes` more of the current step are done."""

    nbytes: int


class Finished(msgspec.Struct, frozen=True, tag=True):
    """The current step is done."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The current step came to nothing; what is done about it is another step, or an error."""

    reason: str


ProgressEvent = Started | Advanced | Finished | Failed
Progress = Callable[[ProgressEvent], None]
"""Receives the steps of a download or a conversion, which follow each other."""


def no_progress(_event: ProgressEvent) -> None:
    """A `Progress` that tells nobody."""


class LoggedProgress:
    """A `Progress` that tells the log: when a step begins, every few seconds how far it is, and when it is done."""

    def __init__(self) -> None:
        self._step = Started("")
        self._done = 0
        self._begin = self._last = time.monotonic()

    def __call__(self, event: ProgressEvent) -> None:
        """Log an event, if there is something new to say."""
        now = time.monotonic()
        label, total = self._step.label, self._step.total
        match event:
            case Started():
                self._step, self._done = event, 0
                self._begin = self._last = now
                logger.info("%s ...", event.label)
            case Advanced(nbytes):
                self._done += nbytes
                if total and now - self._last >= LOG_EVERY_S:
                    self._last = now
                    logger.info("%s: %d%%", label, 100 * self._done // total)
            case Finished():
                logger.info("%s: done in %.1f s", label, now - self._begin)
            case Failed(reason):
                logger.warning("%s: failed after %.1f s: %s", label, now - self._begin, reason)
