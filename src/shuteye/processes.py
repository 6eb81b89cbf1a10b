"""What a process must see to whatever it runs: that it ends with who needs it, and has the descriptors it needs."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import resource
import select
import signal
import sys

PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15  # linux/prctl.h


def name_process(name: str) -> None:
    """Linux: what `top` and `ps -o comm` call this process, whose command line is that of the one it was forked from.

    Args:
        name: at most 15 bytes.
    """
    ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode())


def die_with_parent(parent_pid: int) -> None:
    """Linux: this process outlives its parent by nothing, however that ends. In a container its id may well be 1."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        sys.exit("the parent process has gone already")


def end_with_pipe(reading_fd: int) -> None:
    """Linux: the kernel kills this process as soon as nobody holds the writing end of a pipe, or when it is written to.

    It binds to whoever holds that end, a grandparent for one, whatever this process does meanwhile: it needs no thread
    that would have to look (fcntl(2), F_SETSIG). A fork of the holder must close its copy.
    """
    fcntl.fcntl(reading_fd, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(reading_fd, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(reading_fd, fcntl.F_SETFL, fcntl.fcntl(reading_fd, fcntl.F_GETFL) | os.O_ASYNC)
    poll = select.poll()
    poll.register(reading_fd, select.POLLIN)
    if poll.poll(0):
        sys.exit(0)  # whoever needed this process has gone already


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
