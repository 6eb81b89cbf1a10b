"""What a piece of work took and freed, by the clock and the kernel's account; free heap memory is given back.

Knows nothing of arenas, which are never part of the heap.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shuteye.memory.arena import Arena


def return_free_heap() -> None:
    """Let the C library give whole free pages back, where it can (glibc's malloc_trim)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


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
