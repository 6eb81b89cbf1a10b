"""What a piece of work took, and what it freed: by the clock and by the kernel's account.

Knows nothing of why it was done.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from shuteye.memory.arena import Arena


def timed(work: Callable[[], None]) -> float:
    """Seconds that `work` took."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def freed_by_release(arena: Arena) -> int:
    """Release the arena; the physical bytes that this took out of the process.

    Raises:
        BackendFailure: the kernel refused, or would not say.
    """
    before = arena.resident_bytes()
    arena.release()
    return before - arena.resident_bytes()
