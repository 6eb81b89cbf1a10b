"""How two processes on this machine find each other: a socket in a directory that is gone once they have met.

A connected socket needs its name no longer, so a process killed at any later time leaves nothing. One killed before
leaves its directory, which the next to start here sweeps away. The directory is locked (flock(2), which ends with its
process) for as long as it is needed:
    whoever makes one starts again if it was swept between being made and being locked;
    whoever sweeps removes what it can lock, if it belongs to the same user.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from shuteye.file_locks import try_lock

PREFIX = "shuteye-engine-"
LONGEST_PARENT = 70
"""Bytes; the name of a socket has at most 107 (unix(7)), of which ours takes 32."""


class Rendezvous:
    """A directory that this user alone may enter, with room for one socket.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self) -> None:
        parent = tempfile.gettempdir()
        if len(os.fsencode(parent)) > LONGEST_PARENT:
            parent = "/tmp"  # the directory in it is this user's alone
        _sweep(Path(parent))
        while True:
            self._directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
            lock = _lock(self._directory)
            if lock is not None:
                break
        self._lock = lock

    @property
    def endpoint(self) -> str:
        """The socket's address for ZeroMQ."""
        return f"ipc://{self._directory}/engine"

    def close(self) -> None:
        """Remove the directory; whoever is connected stays so. Idempotent."""
        if self._lock >= 0:
            shutil.rmtree(self._directory, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def _lock(directory: Path) -> int | None:
    """A descriptor that holds the lock of a directory of this user's; None if someone else has it, or it is gone."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        ours = os.fstat(fd).st_uid == os.getuid()
        if ours and try_lock(fd) and os.path.samestat(os.fstat(fd), os.lstat(directory)):
            return fd
    os.close(fd)
    return None


def _sweep(parent: Path) -> None:
    """Remove what starts that were killed before the two had met have left."""
    for orphan in parent.glob(f"{PREFIX}*"):
        lock = _lock(orphan)
        if lock is not None:
            shutil.rmtree(orphan, ignore_errors=True)
            os.close(lock)
