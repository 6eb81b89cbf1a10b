"""Memory that the C library's allocator keeps for later, though nobody uses it."""

from __future__ import annotations

import ctypes


def return_free_heap() -> None:
    """Let the C library give whole free pages back, where it can (glibc's malloc_trim)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
