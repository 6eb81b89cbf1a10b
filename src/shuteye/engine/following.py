"""Follows one request on the event loop, from its sending to its last output.

Knows nothing of what the request is.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

from shuteye.engine.frontend import Frontend
from shuteye.errors import ShuteyeError


async def outputs_of(frontend: Frontend, submit: Callable[..., str]) -> AsyncGenerator[Any, None]:
    """What is delivered for one request, until it is finished; the request is aborted if nobody waits for that.

    Args:
        frontend: the one of now; after a restart there is another.
        submit: sends the request, given `deliver`; returns its id.
    """
    queue: asyncio.Queue[Any] = asyncio.Queue()
    deliver = queue.put_nowait
    request_id = submit(deliver=deliver)
    try:
        while True:
            item = await queue.get()
            if isinstance(item, ShuteyeError):
                raise item
            yield item
            if item.finished:
                return
    finally:
        frontend.abort(request_id, deliver=deliver)
