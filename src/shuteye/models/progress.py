"""How long-running steps tell a caller how far they are.

Knows nothing of terminals: the command line draws it, tests record it, everyone else passes nothing.
"""

from __future__ import annotations

from typing import Protocol


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


class NoProgress:
    """Tells nobody."""

    def start(self, label: str, total: int | None) -> None:
        """Nothing."""

    def advance(self, amount: int) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""
