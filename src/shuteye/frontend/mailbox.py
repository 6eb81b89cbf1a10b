"""What an engine delivers for one request until its caller takes it, bounded; and following it to its last output."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from shuteye.errors import RequestAborted, ShuteyeError
from shuteye.tasks.base import Deltas, Job

if TYPE_CHECKING:
    from shuteye.frontend.engine_client import EngineClient

OutputT = TypeVar("OutputT")

MAX_BACKLOG = 256 * 1024
"""Tokens and log-probabilities that may wait to be taken, over all sequences that share a `Backlog`: some 50 MiB."""

JOINED = 64
"""Outputs that become one if nobody takes them: few objects, none of which takes long to encode."""


class Backlog:
    """Counts what waits in some mailboxes; once it is more than `limit`, all of their requests are aborted at once."""

    def __init__(self, limit: int = MAX_BACKLOG) -> None:
        self._limit = limit
        self._size = 0
        self._overrun: RequestAborted | None = None
        self._mailboxes: list[Mailbox] = []

    def include(self, mailbox: Mailbox) -> None:
        """Count what waits in `mailbox`, too."""
        self._mailboxes.append(mailbox)
        if self._overrun is not None:
            mailbox.give_up(self._overrun)

    def grow(self, count: int) -> None:
        """So much more waits, or less if it is negative."""
        self._size += count
        if self._size <= self._limit or self._overrun is not None:
            return
        self._overrun = RequestAborted(
            f"The request was ended: more than {self._limit:,} tokens and log-probabilities of it were waiting to be "
            "read. Read faster, or ask for fewer sequences or log-probabilities at once."
        )
        for mailbox in self._mailboxes:
            mailbox.give_up(self._overrun)


class Mailbox:
    """Outputs of one request that were delivered and not taken yet.

    Args:
        deltas: None for outputs that say all that those before them said, of which only the newest is kept.
        backlog: counts deltas.
        abort: ends the request, for which nothing is delivered any more.
    """

    def __init__(self, deltas: Deltas | None, backlog: Backlog, *, abort: Callable[[], None]) -> None:
        self._deltas = deltas
        self._backlog = backlog
        self._abort = abort
        self._joined: deque[Any] = deque()  # older than all of `_single`
        self._single: list[Any] = []
        self._error: ShuteyeError | None = None
        self._news = asyncio.Event()

    def deliver(self, item: Any) -> None:
        """Take in an output, or the error that is the last to come."""
        if isinstance(item, ShuteyeError):
            self._error = item
        elif self._deltas is None:
            self._single = [item]
        else:
            self._add(item, self._deltas)
        self._news.set()

    def _add(self, item: Any, deltas: Deltas) -> None:
        self._single.append(item)
        if len(self._single) == JOINED:
            self._joined.append(deltas.join(self._single))
            self._single = []
        self._backlog.grow(deltas.weigh(item))

    async def take(self) -> Any:
        """The oldest output, joined with those that follow it, as soon as there is one.

        Raises:
            ShuteyeError: the request failed, and everything before was taken; or too much waited to be taken.
        """
        while not (self._joined or self._single):
            if self._error is not None:
                raise self._error
            self._news.clear()
            await self._news.wait()
        if self._joined:
            item = self._joined.popleft()
        else:
            single, self._single = self._single, []
            item = single[0] if self._deltas is None or len(single) == 1 else self._deltas.join(single)
        if self._deltas is not None:
            self._backlog.grow(-self._deltas.weigh(item))
        return item

    def give_up(self, error: ShuteyeError) -> None:
        """Abort the request, drop what waits, and have whoever comes to take it get `error`."""
        self._joined.clear()
        self._single.clear()
        self._error = error
        self._abort()
        self._news.set()


async def outputs_of(
    client: EngineClient, job: Job[OutputT], *, request_id: str | None = None, backlog: Backlog | None = None
) -> AsyncGenerator[OutputT, None]:
    """What is delivered for one request, until it is finished; the request is aborted if nobody waits for that.

    Args:
        client: the one of now; after a restart there is another.
        backlog: counts what was not taken, together with that of other requests; None for a count of its own.
    """

    def abort() -> None:
        client.abort(submitted_id, deliver=mailbox.deliver)

    backlog = backlog or Backlog()
    mailbox = Mailbox(job.deltas, backlog, abort=abort)
    submitted_id = client.submit(job, request_id=request_id, deliver=mailbox.deliver)
    try:
        backlog.include(mailbox)
        while True:
            item = await mailbox.take()
            yield item
            if item.finished:
                return
    finally:
        abort()
