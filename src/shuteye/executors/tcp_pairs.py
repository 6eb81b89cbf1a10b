"""ZeroMQ pairs between machines: who is at the other end is proven by keys (CURVE), and a lost peer is noticed.

The engine's side listens, for one rank each; all others are turned away in the handshake. Heartbeats are ZeroMQ's
own (ZMTP 3.1, https://rfc.zeromq.org/spec/37/), answered by its I/O thread whatever the process computes: a stopped
process, a stopped machine and a dead link look the same, and are noticed after `SILENCE_S`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import recv_monitor_message

from shuteye.executors.frames import EngineAddress
from shuteye.executors.wire import bind_pair, open_pair

SILENCE_S = 4.0
"""A peer that says nothing for so long is lost; after the last heartbeat, of which there are two a second."""

_HEARTBEATS: Mapping[int, int | bytes] = {
    zmq.HEARTBEAT_IVL: 500,
    zmq.HEARTBEAT_TIMEOUT: int(SILENCE_S * 1000),
    zmq.HEARTBEAT_TTL: int(SILENCE_S * 1000),
    zmq.HANDSHAKE_IVL: 5_000,
    zmq.IPV6: 1,
}
_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_CONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED


class FrontDoor:
    """Opens sockets on `host` at which one rank each is let in.

    Args:
        host: an address of this machine that ranks reach.
    """

    def __init__(self, context: zmq.Context[Any], host: str) -> None:
        self._context = context
        self._host = f"[{host}]" if ":" in host else host
        self._public, self._secret = zmq.curve_keypair()
        self._admitted: set[bytes] = set()
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(domain="*", credentials_provider=self)

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether whoever holds the secret half of `key` is let in: what the authenticator asks, on its thread."""
        return key in self._admitted

    def open(self) -> tuple[zmq.Socket[Any], zmq.Socket[Any], EngineAddress]:
        """Sockets for asking a rank and for telling it of aborts, and what it must know to get in.

        Raises:
            zmq.ZMQError: `host` is no address of this machine, or it has no ports left.
        """
        public, secret = zmq.curve_keypair()
        self._admitted.add(public)
        asks = self._listen()
        try:
            aborts = self._listen()
        except zmq.ZMQError:
            asks.close()
            raise
        ends = (_endpoint(asks), _endpoint(aborts))
        return asks, aborts, EngineAddress(*ends, self._public.decode(), public.decode(), secret.decode())

    def forget(self, address: EngineAddress) -> None:
        """Let that rank in no more."""
        self._admitted.discard(address.public_key.encode())

    def close(self) -> None:
        """End the thread. Idempotent."""
        self._authenticator.stop()

    def _listen(self) -> zmq.Socket[Any]:
        keys: dict[int, int | bytes] = {zmq.CURVE_SERVER: 1, zmq.CURVE_SECRETKEY: self._secret}
        return bind_pair(self._context, f"tcp://{self._host}:*", {**_HEARTBEATS, **keys})


def _endpoint(socket: zmq.Socket[Any]) -> str:
    endpoint = socket.last_endpoint
    assert isinstance(endpoint, bytes)
    return endpoint.decode().rstrip("\0")


def connect(
    context: zmq.Context[Any], endpoint: str, address: EngineAddress
) -> tuple[zmq.Socket[Any], ConnectionMonitor]:
    """A rank's side of one of the two, and whether its engine is there."""
    keys: dict[int, int | bytes] = {
        zmq.CURVE_SERVERKEY: address.engine_key.encode(),
        zmq.CURVE_PUBLICKEY: address.public_key.encode(),
        zmq.CURVE_SECRETKEY: address.secret_key.encode(),
    }
    socket = open_pair(context, {**_HEARTBEATS, **keys})
    monitor = ConnectionMonitor(socket)  # before it connects: what comes earlier is told to nobody
    socket.connect(endpoint)
    return socket, monitor


class ConnectionMonitor:
    """Whether the one peer of a socket has come, and whether it has gone; on the thread that asks.

    Strangers come and go at a listening socket, too, and events do not say whose they are: the peer is one of those
    who had come when a handshake succeeded, and it has gone when none of these is left. Later ones do not count.

    Attributes:
        socket: can be read when `look` would find something new.
    """

    def __init__(self, socket: zmq.Socket[Any]) -> None:
        self._watched = socket
        self.socket = socket.get_monitor_socket(_EVENTS)
        self.has_come = False
        self.has_gone = False
        self._descriptors: set[int] = set()

    def look(self) -> None:
        """Take in what has happened."""
        while self.socket.poll(0):
            found = recv_monitor_message(self.socket)
            self.note(found["event"], found["value"])

    def note(self, event: int, value: int) -> None:
        """Of one event; `value` is a descriptor, if it is of a connection."""
        match event:
            case zmq.EVENT_ACCEPTED | zmq.EVENT_CONNECTED if not self.has_come:
                self._descriptors.add(value)
            case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.has_come = True
            case zmq.EVENT_DISCONNECTED:
                self._descriptors.discard(value)
        self.has_gone = self.has_come and not self._descriptors

    def close(self) -> None:
        """Give up the monitor, before its socket is closed."""
        self._watched.disable_monitor()
        self.socket.close(0)
