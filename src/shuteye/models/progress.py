"""How long-running steps tell a caller how far they are.

Knows nothing of terminals: the command line draws it, an engine logs it, tests record it.
"""

from __future__ import annotations

import logging
import time
from typing import Protocol

LOG_EVERY_S = 5.0

logger = logging.getLogger(__name__)


class Progress(Protocol):
    """Receives the steps of a download or a conversion; they follow each other, and a new start ends the last step."""

    def start(self, label: str, total: int | None) -> None:
        """A step begins; `total` is in bytes, or None if it cannot be known."""
        ...

    def advance(self, amount: int) -> None:
        """`amount` more bytes of the current step are done."""
        ...

    def finish(self) -> None:
        """The current step is done."""
        ...

    def fail(self, reason: str) -> None:
        """The current step came to nothing; what is done about it is another step, or an error."""
        ...


class NoProgress:
    """Tells nobody."""

    def start(self, label: str, total: int | None) -> None:
        """Nothing."""

    def advance(self, amount: int) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""

    def fail(self, reason: str) -> None:
        """Nothing."""


class LoggedProgress:
    """Tells the log: when a step begins, every few seconds how far it is, and when it is done."""

    def __init__(self) -> None:
        self._label = ""
        self._total: int | None = None
        self._done = 0
        self._begin = self._last = time.monotonic()

    def start(self, label: str, total: int | None) -> None:
        """See `Progress`."""
        self._label, self._total, self._done = label, total, 0
        self._begin = self._last = time.monotonic()
        logger.info("%s ...", label)

    def advance(self, amount: int) -> None:
        """See `Progress`."""
        self._done += amount
        now = time.monotonic()
        if self._total and now - self._last >= LOG_EVERY_S:
            self._last = now
            logger.info("%s: %d%%", self._label, 100 * self._done // self._total)

    def finish(self) -> None:
        """See `Progress`."""
        logger.info("%s: done in %.1f s", self._label, time.monotonic() - self._begin)

    def fail(self, reason: str) -> None:
        """See `Progress`."""
        logger.warning("%s: failed after %.1f s: %s", self._label, time.monotonic() - self._begin, reason)
