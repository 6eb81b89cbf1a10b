"""Server-sent events, and work that stops when the client goes, so that nothing is computed for nobody.

Format: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Response

from shuteye.errors import InternalError, ShuteyeError
from shuteye.server.http.errors import ClientDisconnected, error_json

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send


T = TypeVar("T")


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled and awaited if the client disconnects first.

    Call it only after the request's body has been read.

    Raises:
        ClientDisconnected: the client disconnected.
    """
    task = asyncio.create_task(work)
    listener = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((task, listener), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnected
        return task.result()
    finally:
        task.cancel()
        listener.cancel()
        await asyncio.gather(task, listener, return_exceptions=True)


async def run_to_completion(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is not cancelled with its caller: that one goes on only once the work has ended."""
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait((task,))
        raise


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


TURN_S = 0.03
"""How long a stream may send what is waiting before it yields to others, and its client's end is noticed.

Less than that leaves the loop to the engine's outputs, which then come faster than they are sent."""

DONE = b"data: [DONE]\n\n"
BUG = "Internal server error: a bug of ours; the server's log has more."


def event(payload: bytes) -> bytes:
    """One event; `payload` must hold no newline, as compact JSON does not."""
    return b"data: " + payload + b"\n\n"


class EventStream(Response):
    """Sends what `events` makes of `source`; closes both however the response ends, so that the engine aborts at once.

    `source` is closed too because closing a generator that never began does not run its clean-up.

    Args:
        with_done: end as OpenAI's streams do: with an event that says what went wrong, if anything did, and `[DONE]`.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], *, source: AsyncGenerator[Any, None], with_done: bool = False
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._source = source
        self._with_done = with_done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until the source ends or the client disconnects."""
        async with aclosing(self._source), aclosing(self._events):
            with suppress(ClientDisconnected):
                await until_disconnect(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        turn_ends = time.monotonic() + TURN_S
        end, bug = DONE if self._with_done else b"", None
        try:
            while (chunk := await anext(self._events, None)) is not None:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                if time.monotonic() > turn_ends:  # neither sending nor receiving may have suspended
                    await asyncio.sleep(0)
                    turn_ends = time.monotonic() + TURN_S
        except ShuteyeError as error:
            if not self._with_done:
                raise
            end = event(error_json(error)) + DONE
        except Exception as error:
            if not self._with_done:
                raise
            bug = error
            end = event(error_json(InternalError(BUG))) + DONE
        await send({"type": "http.response.body", "body": end, "more_body": False})
        if bug is not None:
            raise bug
