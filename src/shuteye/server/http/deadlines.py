"""How long a client may take to send its request: head and body, each with a deadline.

Knows nothing of what is in them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

import h11
from starlette.exceptions import HTTPException
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from shuteye.server.http.errors import http_error

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


class Connection(H11Protocol):
    """Has `header_timeout_s` from its first byte to the end of a head, and from its opening to the first one's.

    So has a client for what is left of a body after the request was answered, such as one that was too large.
    """

    def __init__(
        self, config: Config, server_state: ServerState, app_state: dict[str, Any], *, header_timeout_s: float
    ) -> None:
        super().__init__(config, server_state, app_state)
        self._header_timeout_s = header_timeout_s
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first head."""
        super().connection_made(transport)
        self._begin_waiting()

    def data_received(self, data: bytes) -> None:
        """Whatever does not make a request whole is the beginning of a head, or of no use."""
        super().data_received(data)
        if self._is_answering:
            self._end_waiting()
        else:
            self._begin_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        self._end_waiting()
        super().connection_lost(exc)

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _begin_waiting(self) -> None:
        if self._deadline is None and not self.transport.is_closing():
            self._deadline = self.loop.call_later(self._header_timeout_s, self._give_up)

    def _end_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        """Answer half a head with 408 (RFC 9110, 15.5.9); whoever sent nothing of one is not told anything."""
        self._deadline = None
        if self._is_answering or self.transport.is_closing():
            return
        if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            waited = f"The request's head was not whole after {self._header_timeout_s:g} seconds."
            answer = http_error(408, waited, {"Connection": "close"})
            start = h11.Response(status_code=408, headers=answer.raw_headers, reason=b"Request Timeout")
            for event in (start, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
