"""Ends requests whose body stops coming, or trickles, with 408: nobody holds a place by sending half of one.

Knows nothing of routes; plain ASGI. Only the time counts that a route waits for its client, and none once the body is
whole.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

MIN_BYTES_PER_S = 500
"""A body that comes more slowly than this, on average, has stalled, too; as Apache's `RequestReadTimeout` has it."""


class PendingBodies:
    """The bodies that one server is waiting for."""

    def __init__(self) -> None:
        self._waits: set[asyncio.Timeout] = set()
        self._given_up = False

    def give_up(self) -> None:
        """Wait for no body any longer, as the server ends: requests without theirs are answered with 408."""
        self._given_up = True
        for wait in self._waits:
            wait.reschedule(asyncio.get_running_loop().time())

    async def part(self, receive: Receive, timeout_s: float) -> Message:
        """The next part of a body.

        Raises:
            TimeoutError: it did not come in time.
        """
        async with asyncio.timeout(0 if self._given_up else timeout_s) as wait:
            self._waits.add(wait)
            try:
                return await receive()
            finally:
                self._waits.discard(wait)


class BodyDeadline:
    """ASGI middleware: a body of which nothing comes for `timeout_s` raises HTTP 408 where the route reads it."""

    def __init__(self, app: ASGIApp, *, timeout_s: float, pending: PendingBodies) -> None:
        self.app = app
        self.timeout_s = timeout_s
        self.pending = pending

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Pass the request on, timing what is received."""
        if scope["type"] == "http":
            receive = self._timed(receive)
        return self.app(scope, receive, send)

    def _timed(self, receive: Receive) -> Receive:
        nbytes, waited_s, whole = 0, 0.0, False
        loop = asyncio.get_running_loop()

        async def timed() -> Message:
            nonlocal nbytes, waited_s, whole
            if whole:
                return await receive()  # tells, at some time, that the client went
            began = loop.time()
            left_s = self.timeout_s + nbytes / MIN_BYTES_PER_S - waited_s
            try:
                message = await self.pending.part(receive, min(self.timeout_s, left_s))
            except TimeoutError:
                raise HTTPException(408, self._reason(nbytes), headers={"Connection": "close"}) from None
            waited_s += loop.time() - began
            nbytes += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            return message

        return timed

    def _reason(self, nbytes: int) -> str:
        return (
            f"The request's body stopped coming after {nbytes:,} bytes: nothing for {self.timeout_s:g} seconds, less "
            f"than {MIN_BYTES_PER_S} bytes a second, or nothing before the server stopped. Send it again, all of it."
        )
