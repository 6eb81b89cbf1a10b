"""Locks of files, by flock(2): they end with the process that holds them, however that ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LOCKS = Path("/proc/locks")


def lock_file(path: Path) -> int:
    """An exclusively locked descriptor of the file that `path` names, also after waiting.

    Raises:
        OSError: the file cannot be made.
    """
    while True:
        fd = _open(path)
        with closing_on_error(fd):
            fcntl.flock(fd, fcntl.LOCK_EX)
            if _is_named(fd, path):
                return fd
        os.close(fd)  # its holder deleted it on leaving, and we locked a file without a name


def try_lock_file(path: Path) -> int | None:
    """`lock_file` without waiting; None if somebody holds it.

    Raises:
        OSError: the file cannot be made.
    """
    fd = _open(path)
    with closing_on_error(fd):
        if try_lock(fd) and _is_named(fd, path):
            return fd
    os.close(fd)
    return None


def try_lock(fd: int) -> bool:
    """Lock an open file exclusively, if nobody holds it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock; writes nothing, so that it can be asked of a read-only directory."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return not try_lock(fd)
    finally:
        os.close(fd)


def holders(path: Path) -> tuple[int, ...]:
    """The processes that hold a lock of the file, shared or not; none if the system does not tell. Source: proc(5)."""
    try:
        status, lines = path.stat(), _LOCKS.read_text().splitlines()
    except OSError:
        return ()
    file = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    fields = (line.split() for line in lines)
    found = {int(one[4]) for one in fields if len(one) > 5 and one[1] == "FLOCK" and one[5] == file}
    return tuple(sorted(found - {0}))  # 0: a process of another container


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _is_named(fd: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(fd))
    return False


@contextmanager
def closing_on_error(fd: int) -> Iterator[None]:
    """Close the descriptor if the body does not get to its end; afterwards it is whoever's the body gave it to."""
    try:
        yield
    except BaseException:
        os.close(fd)
        raise
