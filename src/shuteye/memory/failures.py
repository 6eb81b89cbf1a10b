"""Turns what the kernel refuses into shuteye's own errors: the one boundary to errno.

Knows nothing of which call it was.
"""

from __future__ import annotations

import errno
import os

from shuteye.errors import BackendFailure, MemoryExhausted

_NO_ROOM = frozenset({errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def failure_of(what: str, code: int | None, *, advice: str = "") -> BackendFailure | MemoryExhausted:
    """The error to raise when `what` failed with errno `code`: exhaustion if there was no room, else a failure."""
    kind = MemoryExhausted if code in _NO_ROOM else BackendFailure
    return kind(f"{what} failed: {os.strerror(code or 0)} (errno {code}). {advice}".rstrip())
