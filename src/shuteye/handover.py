"""Files without a name, handed to another process of the same user by a path that leads to them.

However this process ends, nothing of them is left.
"""

from __future__ import annotations

import contextlib
import os

SHARED_MEMORY = "/dev/shm"


class NamelessFile:
    """A file in shared memory, where there is some; its room is that of `/dev/shm`, and goes back with `close`.

    Whoever is given `path` must have opened it before `close`: the path may lead to another file afterwards.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self) -> None:
        self.fd = _new_file()

    @property
    def path(self) -> str:
        """Where other processes of this user find it, as long as it is open here (proc(5), /proc/pid/fd)."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    def write(self, content: bytes | bytearray | memoryview) -> int:
        """Append all of `content`; its length in bytes.

        Raises:
            OSError: there is no room for it.
        """
        rest = memoryview(content).cast("B")
        while rest:
            rest = rest[os.write(self.fd, rest) :]
        return memoryview(content).nbytes

    def close(self) -> None:
        """Give it up; processes that have it open go on reading. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _new_file() -> int:
    with contextlib.suppress(OSError):  # no such directory, or a file system that cannot
        return os.open(SHARED_MEMORY, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    return os.memfd_create("shuteye-handover", os.MFD_CLOEXEC)
