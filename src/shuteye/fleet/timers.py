"""Times at which something is due, by what it is about. They can be moved and cancelled; the next is found fast."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from enum import IntEnum
from typing import TypeAlias


class Due(IntEnum):
    """What there is to do at a time; of one moment, what comes first here is done first."""

    LEASE_OVER = 0
    CLAIM_OVER = 1
    DEADLINE = 2
    IDLE = 3
    ESCALATE = 4
    RECHECK = 5


Key: TypeAlias = tuple[Due, str]


class Timers:
    """Times by key.

    The heap may hold a time that was moved to later: it is put back when it comes up, so that moving is cheap.
    """

    def __init__(self) -> None:
        self._at: dict[Key, float] = {}
        self._queued: dict[Key, float] = {}
        self._heap: list[tuple[float, Key]] = []

    def set(self, key: Key, at: float) -> None:
        """Have `key` come up at `at`, and no longer at another time."""
        self._at[key] = at
        queued = self._queued.get(key)
        if queued is None or at < queued:
            self._queued[key] = at
            heapq.heappush(self._heap, (at, key))

    def set_earlier(self, key: Key, at: float) -> None:
        """Have `key` come up at `at`, or when it would anyway if that is sooner."""
        known = self._at.get(key)
        if known is None or at < known:
            self.set(key, at)

    def cancel(self, key: Key) -> None:
        """Have `key` not come up."""
        self._at.pop(key, None)

    def at(self, key: Key) -> float | None:
        """When `key` comes up."""
        return self._at.get(key)

    @property
    def next_at(self) -> float | None:
        """When the first of them comes up."""
        while self._heap:
            at, key = self._heap[0]
            if self._at.get(key) == at:
                return at
            self._drop_first()
        return None

    def due(self, now: float) -> Iterator[Key]:
        """Keys that have come up, in order; each is then no longer set. Others may be set meanwhile."""
        while (at := self.next_at) is not None and at <= now:
            _, key = heapq.heappop(self._heap)
            del self._at[key], self._queued[key]
            yield key

    def _drop_first(self) -> None:
        """Put the first of the heap where it belongs, if it still does anywhere."""
        at, key = heapq.heappop(self._heap)
        if self._queued.get(key) != at:  # there is an earlier one of this key, or was
            return
        wanted = self._at.get(key)
        if wanted is None:
            del self._queued[key]
        else:
            self._queued[key] = wanted
            heapq.heappush(self._heap, (wanted, key))
