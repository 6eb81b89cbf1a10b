"""What to do when the kernel refuses: errno becomes one of shuteye's own errors, and a descriptor is not left behind.

Knows nothing of which call it was.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from shuteye.errors import BackendFailure, MemoryExhausted

_NO_ROOM = frozenset({errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def failure_of(what: str, code: int | None, *, advice: str = "") -> BackendFailure | MemoryExhausted:
    """The error to raise when `what` failed with errno `code`: exhaustion if there was no room, else a failure."""
    kind = MemoryExhausted if code in _NO_ROOM else BackendFailure
    return kind(f"{what} failed: {os.strerror(code or 0)} (errno {code}). {advice}".rstrip())


@contextmanager
def closing_on_error(fd: int) -> Iterator[None]:
    """Close the descriptor if the body does not get to its end; afterwards it is whoever's the body gave it to."""
    try:
        yield
    except BaseException:
        os.close(fd)
        raise
