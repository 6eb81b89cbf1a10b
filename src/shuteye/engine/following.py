"""Follows one request on the event loop, from its sending to its last output.

Knows nothing of what the request is.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any

from shuteye.engine.frontend import Frontend
from shuteye.engine.mailbox import Backlog, Deltas, Mailbox


async def outputs_of(
    frontend: Frontend, submit: Callable[..., str], *, deltas: Deltas | None = None, backlog: Backlog | None = None
) -> AsyncGenerator[Any, None]:
    """What is delivered for one request, until it is finished; the request is aborted if nobody waits for that.

    Args:
        frontend: the one of now; after a restart there is another.
        submit: sends the request, given `deliver`; returns its id.
        deltas: how outputs that say only what is new become one, if they come faster than they are taken.
        backlog: counts what was not taken, together with that of other requests; None for a count of its own.
    """

    def abort() -> None:
        frontend.abort(request_id, deliver=mailbox.deliver)

    backlog = backlog or Backlog()
    mailbox = Mailbox(deltas, backlog, abort=abort)
    request_id = submit(deliver=mailbox.deliver)
    try:
        backlog.include(mailbox)
        while True:
            item = await mailbox.take()
            yield item
            if item.finished:
                return
    finally:
        abort()
