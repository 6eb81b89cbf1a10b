"""One HTTP/1.1 connection: uvicorn's, which is closed if a request's head does not come in time.

Knows nothing of bodies that a route waits for (`body_deadline.py`), nor of connections that are idle between two
requests (uvicorn's keep-alive timeout).
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from shuteye.server.errors import http_error


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
