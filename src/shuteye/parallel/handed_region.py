"""Shared memory of a group that its ranks make by themselves: the first one makes it, the others of its machine get it.

They meet at a unix socket in the abstract namespace (unix(7)): it has no file and ends with its process. Both sides
check that the other one is of the same user, as anybody on the machine can see its name.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable

from shuteye.errors import GroupAborted
from shuteye.parallel.group import ShmGroup, ShmRegion, refused

_LOOK_S = 0.05
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


def join_handed(
    name: str, rank: int, size: int, *, epoch: int, timeout_s: float, stopped: Callable[[], str | None] = lambda: None
) -> ShmGroup:
    """The group whose memory rank 0 hands out under `name`, which no other group has had.

    Args:
        stopped: asked while waiting for rank 0; why nobody should wait any longer.

    Raises:
        GroupAborted: rank 0 has not come in time, or `stopped` says so.
        NativeUnavailable, BackendFailure, MemoryExhausted: as `ShmRegion`.
    """
    if rank == 0:
        with contextlib.ExitStack() as undo:
            region = ShmRegion(size, epoch=epoch)
            undo.callback(region.close)
            group = ShmGroup(region.fd, rank, size, epoch=epoch, timeout_s=timeout_s)
            undo.callback(group.close)
            _hand_out(region, name, size - 1, timeout_s)  # last: once all have it, the region is closed
            undo.pop_all()
        return group
    fd = _ask_for(name, timeout_s, stopped)
    try:
        return ShmGroup(fd, rank, size, epoch=epoch, timeout_s=timeout_s)
    finally:
        os.close(fd)


def _hand_out(region: ShmRegion, name: str, count: int, timeout_s: float) -> None:
    """Listen before anybody is told that this rank has joined; a thread gives the memory to `count` others."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(f"\0{name}")
        listener.listen()
    except OSError as error:
        listener.close()
        raise refused(f"its name is taken: {error}") from error
    threading.Thread(
        target=_serve, args=(listener, region, count, timeout_s), name="shuteye-region", daemon=True
    ).start()


def _serve(listener: socket.socket, region: ShmRegion, count: int, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    with listener, contextlib.suppress(TimeoutError):
        while count:
            listener.settimeout(max(0.0, deadline - time.monotonic()) or _LOOK_S)
            peer, _ = listener.accept()
            with peer, contextlib.suppress(OSError):  # it has gone again
                if _is_ours(peer):
                    socket.send_fds(peer, [b"r"], [region.fd])
                    count -= 1
            if time.monotonic() >= deadline:
                break
    region.close()


def _ask_for(name: str, timeout_s: float, stopped: Callable[[], str | None]) -> int:
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(1.0)
            connection.connect(f"\0{name}")
            if not _is_ours(connection):
                raise refused("its memory is offered by another user")
            _, fds, _, _ = socket.recv_fds(connection, 1, 1)
            if fds:
                os.set_inheritable(fds[0], False)
                return fds[0]
        if reason := stopped():
            raise GroupAborted(f"The group was given up before all had joined: {reason}.")
        if time.monotonic() >= deadline:
            raise refused(f"its first rank has not made its memory within {timeout_s:g} s")
        time.sleep(_LOOK_S)


def _is_ours(connection: socket.socket) -> bool:
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(raw)
    return bool(uid == os.getuid())
