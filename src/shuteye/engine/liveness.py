"""How the server sees that an engine process lives: counters in memory that both share.

Counters, no clocks. The server counts only time in which it looked itself, so that a machine that was suspended, or
starved both, makes no engine look hung.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from dataclasses import dataclass

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
