"""A rank's KV cache in memory: whether it is mapped, and what giving it back freed. Its contents are never kept."""

from __future__ import annotations

import time

from shuteye.memory.arena import Arena
from shuteye.memory.release import Release
from shuteye.state import TagReport, TagResidency, TagState


class KVCacheMemory:
    """Takes charge of an arena that is reserved, with nothing committed.

    Attributes:
        residency: `resident` or `discarded`; changes before memory goes, and whoever brings it back sets it after.
    """

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.residency: TagResidency = "discarded"
        self._released: Release | None = None  # by the sleep under way

    def state(self) -> TagState:
        """Where it is, measured now.

        Raises:
            BackendFailure: the kernel would not say.
        """
        return TagState("kv_cache", self.residency, None, self.arena.nbytes, self.arena.resident_bytes())

    def begin_release(self) -> None:
        """The next `release` is another sleep's."""
        self._released = None

    def release(self) -> TagReport:
        """Give it back; after an error the next call goes on, and reports what both have freed.

        Raises:
            BackendFailure: the kernel refused; it counts as discarded all the same.
        """
        started = time.perf_counter()
        release = self._released or Release.begin(self.arena, was_mapped=self.residency == "resident")
        self.residency, self._released = "discarded", release
        freed = release.carry_out()
        return TagReport("kv_cache", "discarded", freed_bytes=freed, seconds=time.perf_counter() - started)

    def discard(self) -> None:
        """Give it back, whatever there is of it. Idempotent.

        Raises:
            BackendFailure: see `release`.
        """
        self.residency = "discarded"
        self.arena.release()
