"""A rank's KV cache in memory: whether it is mapped, and what giving it back freed. Its contents are never kept."""

from __future__ import annotations

import time

from shuteye.memory.arena import Arena
from shuteye.state import TagReport, TagResidency, TagState


class KVCacheMemory:
    """Takes charge of an arena that is reserved, with nothing committed.

    Attributes:
        residency: `resident` or `discarded`; changes before memory goes, and whoever brings it back sets it after.
    """

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.residency: TagResidency = "discarded"
        self._resident_before: int | None = None  # bytes when the release under way began; None: there is none

    def state(self) -> TagState:
        """Where it is, measured now.

        Raises:
            BackendFailure: the kernel would not say.
        """
        return TagState("kv_cache", self.residency, None, self.arena.nbytes, self.arena.resident_bytes())

    def begin_release(self) -> None:
        """The next `release` is another sleep's."""
        self._resident_before = None

    def release(self) -> TagReport:
        """Give it back; after an error the next call goes on, and reports what both have freed.

        Raises:
            BackendFailure: the kernel refused; it counts as discarded all the same.
        """
        started = time.perf_counter()
        if self._resident_before is None:
            self._resident_before = self.arena.resident_bytes() if self.residency == "resident" else 0
        self.discard()
        freed = self._resident_before - self.arena.resident_bytes()
        return TagReport("kv_cache", "discarded", freed_bytes=freed, seconds=time.perf_counter() - started)

    def discard(self) -> None:
        """Give it back, whatever there is of it. Idempotent.

        Raises:
            BackendFailure: see `release`.
        """
        self.residency = "discarded"
        self.arena.release()
