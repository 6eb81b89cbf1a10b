"""What a process must see to whatever it runs: that it ends with its parent, and has the descriptors it needs."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(parent_pid: int) -> None:
    """Linux: this process outlives its parent by nothing, however that ends. In a container its id may well be 1."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        sys.exit("the parent process has gone already")


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
