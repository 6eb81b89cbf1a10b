"""What passes between a server, its zygote and an engine that is forked from it, before the engine's socket is there.

    server ── order: an endpoint, and three descriptors ──> zygote ── fork ── engine
    server ── what to serve ─────────────── channel ───────────────────────> engine
    server <─ its process id, and a descriptor of it ── channel ──────────── engine
    server <─ how which process ended ───── zygote

Knows nothing of engines. Imports little, because whoever starts a server begins with this.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

LONGEST = 1 << 17
"""Bytes of one message; a configuration takes some thousands."""

_END = struct.Struct("=ii")
_NUM_ORDER_FDS = 3
_SEPARATOR = b"\0"


def new_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a socket that keeps messages apart, and tells when the other end is gone."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


# --- orders -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ForkOrder:
    """One engine is wanted; its descriptors are this object's own.

    Attributes:
        endpoint: of the engine's socket.
        channel: where it is told what to serve, and announces itself.
        pulse_fd: see `liveness.Pulse`.
        lifeline_fd: see `processes.end_with_pipe`.
        told: what came over the channel already, if it did.
        needs: what must be imported before the fork: `torch`, or `modules`, which takes seconds more.
    """

    endpoint: str
    channel: socket.socket
    pulse_fd: int
    lifeline_fd: int
    told: bytes = b""
    needs: str = ""

    def send(self, control: socket.socket) -> None:
        """Hand it to a zygote; the descriptors stay open here, too.

        Raises:
            OSError: the zygote is gone.
        """
        content = _SEPARATOR.join((self.endpoint.encode(), self.needs.encode(), self.told))
        socket.send_fds(control, [content], [self.channel.fileno(), self.pulse_fd, self.lifeline_fd])

    @classmethod
    def receive(cls, control: socket.socket) -> ForkOrder | None:
        """The next one; None once nobody can send any more."""
        try:
            content, fds, _flags, _address = socket.recv_fds(control, LONGEST, _NUM_ORDER_FDS)
        except ConnectionResetError:  # closed, with ends that it had not read
            return None
        if not content:
            return None
        endpoint, needs, told = content.split(_SEPARATOR, 2)
        channel_fd, pulse_fd, lifeline_fd = fds
        return cls(endpoint.decode(), socket.socket(fileno=channel_fd), pulse_fd, lifeline_fd, told, needs.decode())

    def close(self) -> None:
        """Give up its descriptors."""
        self.channel.close()
        os.close(self.pulse_fd)
        os.close(self.lifeline_fd)


# --- announcements ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Announcement:
    """A process says who it is.

    Attributes:
        pidfd: it and no other, whoever gets its number later (pidfd_open(2)); the receiver's own.
    """

    pid: int
    pidfd: int


def announce(channel: socket.socket) -> None:
    """Tell the other end which process this is."""
    pidfd = os.pidfd_open(os.getpid())
    try:
        socket.send_fds(channel, [str(os.getpid()).encode()], [pidfd])
    finally:
        os.close(pidfd)


def refuse(channel: socket.socket, why: str) -> None:
    """Tell the other end that there will be no process."""
    channel.send(b"!" + why.encode())


def receive_announcement(channel: socket.socket) -> Announcement:
    """What was announced; to be called once there is something to read.

    Raises:
        OSError: there is no such process, and why.
    """
    content, fds, _flags, _address = socket.recv_fds(channel, LONGEST, 1)
    if not fds:
        raise OSError(content[1:].decode() if content else "the process that was to be forked ended before it began")
    return Announcement(int(content), fds[0])


# --- ends ---------------------------------------------------------------------------------------


def send_end(control: socket.socket, pid: int, status: int) -> None:
    """Tell a server how a process ended (wait(2)); one that does not look is not waited for."""
    try:
        control.send(_END.pack(pid, status), socket.MSG_DONTWAIT)
    except (BlockingIOError, BrokenPipeError, ConnectionResetError):
        return


def received_ends(control: socket.socket) -> Iterator[tuple[int, int]]:
    """The process id and wait status of each that has ended since this was last asked. Never waits."""
    while True:
        try:
            content = control.recv(_END.size, socket.MSG_DONTWAIT)
        except (BlockingIOError, ConnectionResetError):
            return
        if not content:
            return
        yield _END.unpack(content)
