"""An engine process as whoever starts it holds it: begun before it is known what it is to serve, told once, ended.

Knows nothing of asyncio, nor of what is said over the socket; `process_link.py` does. Imports little, because whoever
starts a server imports this first, so that the process begins before all else.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

from shuteye.engine.liveness import Pulse
from shuteye.rendezvous import Rendezvous


class EngineProcess:
    """A running process that imports what engines need, and waits to be told what to serve.

    Attributes:
        pulse: how it shows that it lives.
        ended_fd: can be read once it has ended (pidfd_open(2)).

    Raises:
        OSError: it cannot be started, or there is nowhere to put its socket.
    """

    def __init__(self) -> None:
        with contextlib.ExitStack() as stack:
            self._rendezvous = Rendezvous()
            stack.callback(self._rendezvous.close)
            self.pulse = Pulse()
            stack.callback(self.pulse.close)
            arguments = (self._rendezvous.endpoint, str(os.getpid()), str(self.pulse.fd))
            self._popen = subprocess.Popen(
                (sys.executable, "-P", "-m", "shuteye.engine.process", *arguments),
                stdin=subprocess.PIPE,
                pass_fds=(self.pulse.fd,),
                start_new_session=True,  # a terminal's Ctrl-C is for the server alone
            )
            stack.callback(self._end)
            self.ended_fd = os.pidfd_open(self._popen.pid)
            stack.callback(os.close, self.ended_fd)
            self._opened = stack.pop_all()

    @property
    def pid(self) -> int:
        """Its id; of one that has ended, what it was."""
        return self._popen.pid

    @property
    def endpoint(self) -> str:
        """Where its socket connects to."""
        return self._rendezvous.endpoint

    @property
    def exit_code(self) -> int | None:
        """How it ended, as `Popen.returncode`; None while it runs."""
        return self._popen.poll()

    def tell(self, frame: bytes) -> None:
        """Give it its `EngineStart`; once. One that has ended already is seen by its end."""
        stdin = self._popen.stdin
        assert stdin is not None
        with contextlib.suppress(BrokenPipeError), stdin:
            stdin.write(frame)

    def let_tell(self) -> None:
        """Leave it to another process, a fork of this one, to `tell`."""
        assert self._popen.stdin is not None
        self._popen.stdin.close()

    def met(self) -> None:
        """Both sides of the socket are there: its name can go."""
        self._rendezvous.close()

    def send_signal(self, number: signal.Signals) -> None:
        """Nothing happens to one that has ended."""
        self._popen.send_signal(number)

    def leave_to_parent(self) -> None:
        """In a fork of whoever started it: its end is for the parent to see."""
        self._popen.returncode = 0

    def close(self) -> None:
        """End it at once if it runs, and give back all that was shared with it. Idempotent."""
        self._opened.close()

    def _end(self) -> None:
        if self._popen.stdin is not None:
            self._popen.stdin.close()
        self._popen.kill()  # ends a stopped process, too
        self._popen.wait()
