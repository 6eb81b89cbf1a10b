"""An engine's process as whoever has it forked holds it: ordered, told once what to serve, seen to its end.

Knows nothing of asyncio, nor of what is said over the engine's socket; `process_link.py` does.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
from collections.abc import Callable
from dataclasses import replace

from shuteye.engine.forking import Announcement, ForkOrder, new_pair, receive_announcement
from shuteye.engine.liveness import Pulse
from shuteye.rendezvous import Rendezvous


class EngineProcess:
    """A process that a zygote forks, and that then waits to be told what to serve.

    It ends when this is closed, and with the process that has this, however that ends.

    Args:
        zygote: where the order for it goes.
        end_of: how a process has ended; see `Zygote.end_of`.

    Attributes:
        pulse: how it shows that it lives.

    Raises:
        OSError: the zygote is gone, there is nowhere to put the engine's socket, or there are no descriptors left.
    """

    def __init__(self, zygote: socket.socket, end_of: Callable[[int], int | None]) -> None:
        self._end_of = end_of
        self._announced: Announcement | None = None
        self._exit_code: int | None = None
        with contextlib.ExitStack() as stack:
            self._rendezvous = Rendezvous()
            stack.callback(self._rendezvous.close)
            self.pulse = Pulse()
            stack.callback(self.pulse.close)
            self._channel, theirs = new_pair()
            with theirs:
                stack.callback(self._channel.close)
                lifeline, self._lifeline = os.pipe2(os.O_CLOEXEC)
                stack.callback(self._end)
                try:
                    ForkOrder(self.endpoint, theirs, self.pulse.fd, lifeline).send(zygote)
                finally:
                    os.close(lifeline)
            self._opened = stack.pop_all()

    @property
    def endpoint(self) -> str:
        """Where its socket connects to."""
        return self._rendezvous.endpoint

    @property
    def channel_fd(self) -> int:
        """Can be read once it has announced itself, or never will."""
        return self._channel.fileno()

    @property
    def pid(self) -> int | None:
        """Its id, since it announced itself; of one that has ended, what it was."""
        return self._announced.pid if self._announced else None

    @property
    def ended_fd(self) -> int:
        """Can be read once it has ended (pidfd_open(2)); there is one from its announcement until this is closed."""
        assert self._announced is not None, "it has not announced itself yet"
        return self._announced.pidfd

    @property
    def exit_code(self) -> int | None:
        """How it ended, as `Popen.returncode`; None while it runs, or if nobody has told yet."""
        if self._exit_code is None and self._announced is not None:
            status = self._end_of(self._announced.pid)
            self._exit_code = _reaped(self.ended_fd) if status is None else os.waitstatus_to_exitcode(status)
        return self._exit_code

    def tell(self, frame: bytes) -> None:
        """Give it its `EngineStart`; once. One that has ended already is seen by its end."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._channel.send(frame)

    def take_announcement(self) -> None:
        """Learn which process it is, once `channel_fd` can be read.

        Raises:
            OSError: there is none, and why.
        """
        self._announced = receive_announcement(self._channel)

    def met(self) -> None:
        """Both sides of the socket are there: its name can go."""
        self._rendezvous.close()

    def send_signal(self, number: signal.Signals) -> None:
        """Nothing happens to one that has ended, or has not announced itself."""
        if self._announced is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._announced.pidfd, number)

    def leave_to_parent(self) -> None:
        """In a fork of whoever has it: it ends with the parent, not with the last of its forks."""
        self._close_lifeline()

    def close(self) -> None:
        """End it at once if it runs, and give back all that was shared with it. Idempotent."""
        self._opened.close()

    def _end(self) -> None:
        self.send_signal(signal.SIGKILL)  # ends a stopped process, too
        self._close_lifeline()  # ends one that is not known yet
        if self._announced is not None:
            select.select([self._announced.pidfd], [], [])
            _ = self.exit_code
            os.close(self._announced.pidfd)
            self._announced = replace(self._announced, pidfd=-1)

    def _close_lifeline(self) -> None:
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1


def _reaped(pidfd: int) -> int | None:
    """The exit code of a process that has become a child of this one, as orphans do of the first of a container."""
    if pidfd < 0:
        return None
    try:
        found = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return None
    if found is None:
        return None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
