"""An event loop in a thread of its own, for callers that block until what runs on it is done."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from shuteye.errors import EngineDead, ShuteyeError
from shuteye.frontend.forks import tell_forks

T = TypeVar("T")

END_S = 5.0
"""How long what still runs may take to end by itself when the loop is closed."""


class LoopThread:
    """Runs coroutines for any thread; a fork of this process has no such thread, so there nothing runs.

    Args:
        closed: what `run` raises after `close`, and whoever waits then.
    """

    def __init__(self, *, closed: ShuteyeError) -> None:
        self._closed = closed
        self._refusal: ShuteyeError | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="shuteye-loop", daemon=True)
        self._thread.start()
        tell_forks(self)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What comes of `work`, which is cancelled if the caller is interrupted meanwhile.

        Raises:
            ShuteyeError: the loop is closed, or the parent's.
        """
        if self._refusal is not None:
            work.close()
            raise self._refusal
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self, last: Callable[[ShuteyeError], Awaitable[None]]) -> None:
        """Run `last`, given what those who wait are told, and end the thread. Idempotent, and nothing in a fork."""
        if self._refusal is not None:
            return
        self._refusal = self._closed
        asyncio.run_coroutine_threadsafe(self._end(last), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self, last: Callable[[ShuteyeError], Awaitable[None]]) -> None:
        try:
            await last(self._closed)
        finally:
            if others := asyncio.all_tasks() - {asyncio.current_task()}:
                _, late = await asyncio.wait(others, timeout=END_S)
                for task in late:
                    task.cancel()
            await asyncio.get_running_loop().shutdown_default_executor()

    def leave_to_parent(self, reason: EngineDead) -> None:
        """See `forks.Inherited`: the thread that runs the loop is the parent's."""
        self._refusal = reason
