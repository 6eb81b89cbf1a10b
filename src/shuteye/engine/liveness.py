"""How an engine process and its server find each other, and how the server sees that the engine lives.

They meet at a socket in a directory that is gone once they have met. A connected socket needs its name no longer, so a
process killed at any later time leaves nothing. One killed before leaves its directory, which the next to start here
sweeps away. The directory is locked (flock(2), which ends with its process) for as long as it is needed:
    whoever makes one starts again if it was swept between being made and being locked;
    whoever sweeps removes what it can lock, if it belongs to the same user.

From then on the engine counts up in memory that both share: counters, no clocks. The server counts only time in which
it looked itself, so that a machine that was suspended, or starved both, makes no engine look hung.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from shuteye.memory.cache_dir import try_lock

PREFIX = "shuteye-engine-"


class Rendezvous:
    """A directory that this user alone may enter, with room for one socket.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self) -> None:
        _sweep(Path(tempfile.gettempdir()))
        while True:
            self._directory = Path(tempfile.mkdtemp(prefix=PREFIX))
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


BEAT_S = 0.5
LOOK_S = 0.5
_BEATS, _TURNS = 0, 1
"""Counters of the page. Turns are odd while the engine works and even while it waits; 0 until it is loaded."""


class Pulse:
    """A page with two counters, of one writer and one reader.

    Args:
        fd: a memory file of another `Pulse`, which this one takes over; None makes one.
    """

    def __init__(self, fd: int | None = None) -> None:
        self.fd = os.memfd_create("shuteye-pulse", os.MFD_CLOEXEC) if fd is None else fd
        if fd is None:
            os.ftruncate(self.fd, mmap.PAGESIZE)
        self._page = mmap.mmap(self.fd, mmap.PAGESIZE)
        self._counters = memoryview(self._page).cast("q")

    def close(self) -> None:
        """Give up the page."""
        self._counters.release()
        self._page.close()
        os.close(self.fd)

    @property
    def beats(self) -> int:
        """How often the process has shown that it runs."""
        return self._counters[_BEATS]

    @property
    def turns(self) -> int:
        """Odd while the engine works, even while it waits, 0 until it is loaded."""
        return self._counters[_TURNS]

    def beat(self) -> None:
        """Show that the process runs."""
        self._counters[_BEATS] += 1

    def beat_in_background(self) -> None:
        """Beat twice a second, whatever else the process does, until it ends."""
        threading.Thread(target=self._beat_for_ever, name="shuteye-pulse", daemon=True).start()

    def _beat_for_ever(self) -> None:
        while True:
            self.beat()
            time.sleep(BEAT_S)

    def waiting(self) -> None:
        """The engine has nothing in hand."""
        if self.turns == 0 or self.turns % 2:
            self._counters[_TURNS] += 2 - self.turns % 2

    def working(self) -> None:
        """The engine has taken up a step, or whatever it does between two looks at its messages."""
        self._counters[_TURNS] += 1 - self.turns % 2


@dataclass(slots=True)
class HangWatch:
    """Looks at a pulse, and says when it has stood still for too long. A process that loads is never taken for hung.

    Args:
        silence_limit_s: without a beat.
        step_limit_s: in one step.
    """

    pulse: Pulse
    silence_limit_s: float
    step_limit_s: float
    silent_s: float = 0.0
    in_step_s: float = 0.0
    _looked: float | None = None
    _beats: int = 0
    _turns: int = 0

    def look(self, now: float) -> str | None:
        """Why the engine counts as hung at `now` (monotonic seconds), or None; to be called every `LOOK_S`."""
        beats, turns = self.pulse.beats, self.pulse.turns
        passed = 0.0 if self._looked is None else min(now - self._looked, 2 * LOOK_S)
        self.silent_s = self.silent_s + passed if beats == self._beats else 0.0
        self.in_step_s = self.in_step_s + passed if turns == self._turns and turns % 2 else 0.0
        self._looked, self._beats, self._turns = now, beats, turns
        if turns == 0:
            return None
        if self.silent_s > self.silence_limit_s:
            return f"its process has given no sign of life for {self.silence_limit_s:g} seconds"
        if self.in_step_s > self.step_limit_s:
            return f"one step has taken more than {self.step_limit_s:g} seconds"
        return None
