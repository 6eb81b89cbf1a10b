"""A rank process, seen from the engine process that starts it, asks it, and may have to kill it.

Knows nothing of groups, or of what is asked.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import zmq

from shuteye import logs
from shuteye.executors.frames import Reply, Start
from shuteye.executors.wire import bind_pair
from shuteye.rendezvous import Rendezvous
from shuteye.typed_frames import Decoder, encode

_GRACE_S = 10.0
"""How long a process that still loads may take to delete what it has begun."""


class RankProcess:
    """Starts the process; it answers once it has loaded. `close` ends it.

    Attributes:
        module: what it runs.
    """

    module: ClassVar[str] = "shuteye.executors.rank"

    def __init__(self, context: zmq.Context[Any], start: Start) -> None:
        self.rank = start.place.rank
        self.epoch = start.meeting.epoch  # of the groups that it joined last
        self.why_killed: str | None = None
        self._patience_s = min(start.config.rank_timeout_s, start.config.hang_timeout_s)
        self._stopped_at: float | None = None  # monotonic seconds
        self._has_answered = False
        self._replies: Decoder[Reply] = Decoder(Reply)
        with contextlib.ExitStack() as stack:
            self._rendezvous = Rendezvous()
            stack.callback(self._rendezvous.close)
            self.socket = bind_pair(context, self._rendezvous.endpoint)
            stack.callback(self.socket.close)
            logged = logs.settings()
            arguments = (self._rendezvous.endpoint, str(os.getpid()), logged.format, logged.level)
            self.process = process = self.spawn((sys.executable, "-P", "-m", self.module, *arguments))
            stack.callback(self._end)
            self.ended_fd = os.pidfd_open(process.pid)
            stack.callback(os.close, self.ended_fd)
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError), process.stdin as stdin:  # it has ended already: others see that
                stdin.write(encode(start))
            self._opened = stack.pop_all()

    @staticmethod
    def spawn(command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a process whose stdin is a pipe; a terminal's Ctrl-C is for us alone."""
        return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def post(self, frame: bytes) -> None:
        """Ask; ZeroMQ's own thread sends it. Never waits: of one that has just ended, the death is seen soon."""
        with contextlib.suppress(zmq.Again):  # nobody is at the other end
            self.socket.send(frame, zmq.NOBLOCK)

    def received(self) -> Reply | None:
        """The next reply, if one has come."""
        try:
            reply = self._replies.decode(self.socket.recv(zmq.NOBLOCK))
        except zmq.Again:
            return None
        self._rendezvous.close()
        self._has_answered = True
        return reply

    def check(self) -> None:
        """Of a process that is stopped nothing is heard, and one that is idle is not asked."""
        if not _is_stopped(self.process.pid):
            self._stopped_at = None
            return
        now = time.monotonic()
        self._stopped_at = now if self._stopped_at is None else self._stopped_at
        if now - self._stopped_at >= self._patience_s:
            self.kill(f"was stopped for {self._patience_s:g} s")

    def kill(self, why: str) -> None:
        """End it, also if it is stopped; its death is seen as any other."""
        self.why_killed = self.why_killed or why
        self.process.kill()

    def reap(self) -> str:
        """How it ended; waits for that."""
        code = self.process.wait()
        if self.why_killed is not None:
            return f"was killed, as it {self.why_killed}"
        return how_ended(code)

    def close(self) -> None:
        """End it and give back everything. Idempotent."""
        self._opened.close()

    def stop_loading(self) -> None:
        """Tell it to end, if it still loads; `close` waits for that."""
        if not self._has_answered:
            self.process.terminate()

    def _end(self) -> None:
        self.stop_loading()
        if not self._has_answered:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_GRACE_S)
        self.process.kill()
        self.process.wait()


def how_ended(code: int) -> str:
    """What the return code of a `Popen` means."""
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"


def _is_stopped(pid: int) -> bool:
    """By SIGSTOP, say; one that a debugger holds is not (proc_pid_stat(5))."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False  # it has ended
    return stat.rpartition(")")[2].split()[0] == "T"
