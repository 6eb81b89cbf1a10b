"""One arena on its way out of memory: what there was of it when that began, so that a second try reports the first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from shuteye.memory.arena import Arena


@dataclass(frozen=True, slots=True)
class Release:
    """What a sleep found when it began to give an arena back.

    Attributes:
        was_mapped: whether there is anything to give back.
        saved_bytes: what had been written and was saved before.
    """

    arena: Arena
    was_mapped: bool
    resident_bytes: int
    saved_bytes: int = 0

    @classmethod
    def begin(cls, arena: Arena, *, was_mapped: bool, saved_bytes: int = 0) -> Self:
        """Measure the arena.

        Raises:
            BackendFailure: the kernel would not say.
        """
        return cls(arena, was_mapped, arena.resident_bytes() if was_mapped else 0, saved_bytes)

    def carry_out(self) -> int:
        """Give the arena back, however often; the physical bytes that have left the process since the beginning.

        Raises:
            BackendFailure: the kernel refused, or would not say.
        """
        if not self.was_mapped:
            return 0
        self.arena.release()
        return self.resident_bytes - self.arena.resident_bytes()
