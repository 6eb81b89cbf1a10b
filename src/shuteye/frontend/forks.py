"""What a fork of this process inherits of an engine: its callers' side, and no engine.

Threads and event loops stay with the parent, while memory files, sockets and the engine process are shared with it. So
a fork is told at once that its copies are of no use, and nothing of them is ever closed there, or collected as garbage:
either could reach what the parent uses.
"""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet

from shuteye.errors import EngineDead


class Inherited(Protocol):
    """A part of the callers' side of an engine."""

    def leave_to_parent(self, reason: EngineDead) -> None:
        """Called in a fork: from now on refuse with `reason`, and touch nothing that the parent has, too."""
        ...


_parts: WeakSet[Inherited] = WeakSet()
_kept: list[Inherited] = []


def tell_forks(part: Inherited) -> None:
    """Have `part` told wherever this process is forked."""
    _parts.add(part)


def _in_fork() -> None:
    reason = EngineDead(
        f"This engine belongs to process {os.getppid()}, and this is {os.getpid()}, a fork of it, which has no engine. "
        "Make one in each process that needs it, after the fork; or start processes by 'spawn' instead of 'fork'."
    )
    for part in list(_parts):
        part.leave_to_parent(reason)
        _kept.append(part)
        _parts.discard(part)


os.register_at_fork(after_in_child=_in_fork)
