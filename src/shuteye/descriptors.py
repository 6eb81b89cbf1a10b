"""How many files and connections this process may have open, and whether any are left.

Knows nothing of what they are used for.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource

MOST = 65_536
"""As far as the limit is raised; a hard limit may be none at all, or a thousand million."""


def raise_limit() -> int:
    """Raise the soft limit towards the hard one; returns how many descriptors this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else min(MOST, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # a sandbox may forbid it: then it stays as it is
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return limit()


def limit() -> int:
    """How many descriptors this process may have open at once."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if soft == resource.RLIM_INFINITY else soft


def are_left(count: int) -> bool:
    """Whether `count` more descriptors can be opened now."""
    with contextlib.ExitStack() as opened:
        try:
            for _ in range(count):
                opened.callback(os.close, os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            if is_shortage(error):
                return False
            raise
    return True


def is_shortage(error: OSError) -> bool:
    """Whether `error` says that this process, or the system, has no more of them."""
    return error.errno in (errno.EMFILE, errno.ENFILE)


def shortage() -> str:
    """What to say of it, and what helps."""
    return (
        f"all file descriptors are in use (this process may have {limit():,}): close connections, or raise the limit "
        "(ulimit -n, or LimitNOFILE= of a systemd unit)"
    )
