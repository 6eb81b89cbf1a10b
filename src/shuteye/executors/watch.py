"""A thread that sees ranks end, whatever the engine is doing meanwhile."""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Callable

from shuteye.executors import RankFailure
from shuteye.executors.links import RankLink

CHECK_EVERY_S = 1


class DeathWatch:
    """Sees ranks end, by their `RankLink.ended_fd`, and has them checked for life.

    Args:
        on_death: called from the thread, before `notify`.

    Attributes:
        died: a descriptor that can be read after a death, until `settle`.
        notify: called from the thread, after a death.
    """

    def __init__(self, on_death: Callable[[RankFailure], None]) -> None:
        self.died = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.notify: Callable[[], None] = lambda: None
        self._on_death = on_death
        self._changed = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self._watched: dict[int, RankLink] = {}
        self._failures: dict[int, RankFailure] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shuteye-ranks", daemon=True)
        self._thread.start()

    def failures(self) -> tuple[RankFailure, ...]:
        """Those that have died and were not forgotten."""
        with self._lock:
            return tuple(self._failures[rank] for rank in sorted(self._failures))

    def add(self, link: RankLink) -> None:
        """Watch a rank, in the place of one that may have died."""
        with self._lock:
            self._failures.pop(link.rank, None)
            self._watched[link.rank] = link
        os.eventfd_write(self._changed, 1)

    def settle(self) -> bool:
        """Whoever waited for deaths has been told of all so far; whether there were any."""
        try:
            os.eventfd_read(self.died)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """End the thread. Idempotent."""
        if self._closing.is_set():
            return
        self._closing.set()
        os.eventfd_write(self._changed, 1)
        self._thread.join()
        os.close(self.died)
        os.close(self._changed)

    def _run(self) -> None:
        while not self._closing.is_set():
            with self._lock:
                watched = {link.ended_fd: link for link in self._watched.values()}
            poller = select.poll()
            for fd in (self._changed, *watched):
                poller.register(fd, select.POLLIN)
            ready = [fd for fd, _ in poller.poll(CHECK_EVERY_S * 1000)]
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._changed)
            if self._closing.is_set():
                return
            for link in (watched[fd] for fd in ready if fd in watched):
                self._note(link)
            if not ready:
                for link in watched.values():
                    link.check()

    def _note(self, link: RankLink) -> None:
        failure = RankFailure(link.rank, link.reap())
        with self._lock:
            del self._watched[link.rank]
            self._failures[link.rank] = failure
        self._on_death(failure)  # later: groups that are made meanwhile by those who know of it are ended by them
        os.eventfd_write(self.died, 1)
        self.notify()
