"""What the executor of several ranks needs of each of them, however it was started and is reached: a seam.

`local_ranks` has them as processes of this machine. Knows nothing of what is asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import zmq

from shuteye.executors.frames import Meeting, Reply, Start
from shuteye.parallel.shards import RankPlace


class RankLink(Protocol):
    """One rank, from its start to its end.

    Attributes:
        epoch: of the groups that it joined last.
        socket: can be read when `received` may have something.
        ended_fd: a descriptor that can be read once the rank has ended; `reap` then says how.
    """

    rank: int
    epoch: int
    socket: zmq.Socket[Any]
    ended_fd: int

    def post(self, frame: bytes) -> None:
        """Ask. Never waits, also for one that has just ended."""

    def received(self) -> Reply | None:
        """The next reply, if one has come."""

    def check(self) -> None:
        """On the watching thread, every second: kill it if it has shown no life for `EngineConfig.rank_timeout_s`."""

    def kill(self, why: str) -> None:
        """End it, also if it is stopped or out of reach; its end is seen as any other."""

    def reap(self) -> str:
        """How it ended, as in "was ended by SIGKILL"; on the watching thread, soon after `ended_fd`."""

    def stop_loading(self) -> None:
        """Tell it to end, if it still loads; `close` waits for that."""

    def close(self) -> None:
        """End it and give back everything. Idempotent."""


class Groups(Protocol):
    """The groups in which the ranks of one epoch meet, as whoever starts the ranks sees them."""

    def meeting(self, place: RankPlace) -> Meeting:
        """What a rank must know to join."""

    @property
    def aborted(self) -> bool:
        """Whether a group was ended, by whomever."""

    def abort(self, reason: str) -> None:
        """End every wait of every rank; from any thread. The first reason counts."""

    def close(self) -> None:
        """Give up this process' part. Idempotent."""


class Launcher(Protocol):
    """Starts ranks, and makes what they meet in."""

    def start(self, start: Start) -> RankLink:
        """Start a rank; it answers call 0 once it has loaded.

        Raises:
            ShuteyeError: there is no room for it, or nowhere to start it.
        """

    def groups(self, *, epoch: int, timeout_s: float) -> Groups:
        """Groups of the ranks that run and of those that are about to be started; nobody has joined them yet.

        Args:
            timeout_s: the longest wait in one of them.
        """

    def away(self) -> Mapping[int, int]:
        """The ranks that run on other machines, each with one of its machine that may hold files for all of them."""

    def close(self) -> None:
        """Give back what is not a rank's own, once all are closed. Idempotent."""
