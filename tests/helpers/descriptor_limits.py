"""A process that may have few files and connections open, or no more at all."""

from __future__ import annotations

import contextlib
import os
import resource


@contextlib.contextmanager
def limited(soft, hard=None):
    """This process with another limit."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1] if hard is None else hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@contextlib.contextmanager
def none_left():
    """This process with every descriptor that it may have in use, and a limit that is soon reached."""
    with limited(max(map(int, os.listdir("/proc/self/fd"))) + 10), contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            while True:
                held.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        yield
