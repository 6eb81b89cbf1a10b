"""Connections: how many are taken at a time, and how long each may take over a head."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from shuteye import processes as descriptors
from shuteye.server.http.errors import http_error

logger = logging.getLogger(__name__)

RESERVED_DESCRIPTORS = 64
"""Left to the server itself: to restart an engine, to receive uploads, to open files."""
AT_ONCE = 64
"""Connections taken before the event loop does something else."""
PAUSE_S = 0.1
LOG_EVERY_S = 60.0


class Acceptor:
    """Accepts connections as long as there are file descriptors; further ones wait in the listener's backlog.

    Args:
        listener: listens already; stays the caller's to close.
        new_connection: makes the protocol of a connection.
        num_open: how many connections there are.
    """

    def __init__(
        self,
        listener: socket.socket,
        new_connection: Callable[[], asyncio.Protocol],
        *,
        num_open: Callable[[], int],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._new_connection = new_connection
        self._num_open = num_open
        self._most = max(1, descriptors.limit() - RESERVED_DESCRIPTORS)
        self._connecting: set[asyncio.Task[None]] = set()
        self._pause: asyncio.TimerHandle | None = None
        self._logged: float | None = None
        self._closed = False
        listener.setblocking(False)
        self._resume()

    def close(self) -> None:
        """Accept no more. Idempotent."""
        self._closed = True
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._listener)

    def _accept(self) -> None:
        for _ in range(AT_ONCE):
            if self._num_open() + len(self._connecting) >= self._most:
                self._wait(f"{self._most:,} are open, as many as there are file descriptors for")
                return
            try:
                accepted, _address = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionAbortedError:  # closed by the client meanwhile
                continue
            except OSError as error:  # out of some resource, or a network error: both may pass
                self._wait(descriptors.shortage() if descriptors.is_shortage(error) else str(error))
                return
            task = self._loop.create_task(self._connect(accepted))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    async def _connect(self, accepted: socket.socket) -> None:
        try:
            accepted.setblocking(False)
            await self._loop.connect_accepted_socket(self._new_connection, accepted)
        except OSError as error:
            logger.warning("A connection could not be used: %s", error)
            accepted.close()

    def _wait(self, why: str) -> None:
        """Leave new connections in the backlog for `PAUSE_S`; logged at most every `LOG_EVERY_S`."""
        self._loop.remove_reader(self._listener)
        self._pause = self._loop.call_later(PAUSE_S, self._resume)
        now = self._loop.time()
        if self._logged is None or now - self._logged >= LOG_EVERY_S:
            self._logged = now
            logger.error("No new connections are taken until others end: %s.", why)

    def _resume(self) -> None:
        self._pause = None
        if not self._closed:
            self._loop.add_reader(self._listener, self._accept)


class Connection(H11Protocol):
    """A connection that is closed unless a head is whole `header_timeout_s` after its first byte, or after the opening.

    The same time is given for the rest of a body after its request was answered, such as one that was too large.
    """

    def __init__(
        self, config: Config, server_state: ServerState, app_state: dict[str, Any], *, header_timeout_s: float
    ) -> None:
        super().__init__(config, server_state, app_state)
        self._header_timeout_s = header_timeout_s
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the deadline of the first head."""
        super().connection_made(transport)
        self._begin_waiting()

    def data_received(self, data: bytes) -> None:
        """Data that leaves no request to answer is part of a head, or of a body that nobody reads."""
        super().data_received(data)
        if self._is_answering:
            self._end_waiting()
        else:
            self._begin_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the deadline."""
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
        """Answer half a head with 408 (RFC 9110, 15.5.9); an idle connection is just closed."""
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
