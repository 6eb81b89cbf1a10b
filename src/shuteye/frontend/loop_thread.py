"""An event loop in a thread of its own, for callers that block until what runs on it is done."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from shuteye.errors import EngineDead, InvalidRequest, ShuteyeError
from shuteye.frontend.forks import tell_forks

T = TypeVar("T")

ENGINE_THREAD = "shuteye-engine"
"""The name of threads in which engines run."""

END_S = 5.0
"""How long what still runs may take to end by itself when the loop is closed."""


class LoopThread:
    """Runs coroutines for any thread; a fork of this process has no such thread, so there nothing runs.

    What is still open when the interpreter ends is closed then: threads that it leaves behind would run into it.

    Args:
        last: what runs last, given `closed`.
        closed: what `run` raises after `close`, and whoever waits then.
    """

    def __init__(self, last: Callable[[ShuteyeError], Awaitable[None]], *, closed: ShuteyeError) -> None:
        self._last = last
        self._closed = closed
        self._refusal: ShuteyeError | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="shuteye-loop", daemon=True)
        self._thread.start()
        tell_forks(self)
        _open.add(self)
        _close_at_exit()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What comes of `work`, which is cancelled if the caller is interrupted meanwhile.

        Raises:
            InvalidRequest: the caller is what the loop or the engine runs, and would wait for itself.
            ShuteyeError: the loop is closed, or the parent's.
        """
        caller = threading.current_thread()
        if caller is self._thread or caller.name == ENGINE_THREAD:
            work.close()
            raise InvalidRequest("The engine cannot be called by what it runs itself, such as an iterable of tensors.")
        if self._refusal is not None:
            work.close()
            raise self._refusal
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Run what runs last, and end the thread. Idempotent, and nothing in a fork."""
        _open.discard(self)
        if self._refusal is not None:
            return
        self._refusal = self._closed
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        try:
            await self._last(self._closed)
        finally:
            if others := asyncio.all_tasks() - {asyncio.current_task()}:
                _, late = await asyncio.wait(others, timeout=END_S)
                for task in late:
                    task.cancel()

    def leave_to_parent(self, reason: EngineDead) -> None:
        """See `forks.Inherited`: the thread that runs the loop is the parent's."""
        _open.discard(self)
        self._refusal = reason


_open: set[LoopThread] = set()
_exit_threads: list[threading.Thread] = []


def _close_at_exit() -> None:
    """Have a thread that closes what is open once all others have ended.

    `atexit` is too late: what torch registers there runs first, and takes away what a step under way needs.
    """
    if not any(thread.is_alive() for thread in _exit_threads):  # that of a parent is none in a fork
        _exit_threads[:] = [threading.Thread(target=_wait_and_close, name="shuteye-exit", daemon=False)]
        _exit_threads[0].start()


def _wait_and_close() -> None:
    spared = {threading.main_thread(), threading.current_thread()}
    threading.main_thread().join()
    while others := [each for each in threading.enumerate() if not each.daemon and each not in spared]:
        for thread in others:
            thread.join()
    for each in tuple(_open):
        each.close()
