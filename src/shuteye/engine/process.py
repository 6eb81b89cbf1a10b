"""The engine in a process of its own: what that process runs.

Knows nothing of HTTP. `python -m shuteye.engine.process ENDPOINT PARENT LOG_FORMAT LOG_LEVEL` reads its config, one
frame, from stdin.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import Any, cast

import zmq

from shuteye import logs
from shuteye.config import EngineConfig
from shuteye.engine.loop import run_engine
from shuteye.engine.messages import FromEngine, ToEngine
from shuteye.executors.wire import Decoder, connect_pair, encode
from shuteye.parent import die_with_parent

MAX_POLL_MS = 1 << 30


class ZmqChannel:
    """The engine's end of a ZeroMQ pair (see `loop.Channel`)."""

    def __init__(self, socket: zmq.Socket[Any]) -> None:
        self._socket = socket
        self._decoder: Decoder[ToEngine] = Decoder(ToEngine)

    def receive(self, timeout_s: float | None) -> Sequence[ToEngine]:
        """Everything that has arrived; waits for the first message."""
        messages: list[ToEngine] = []
        timeout_ms = None if timeout_s is None else min(int(timeout_s * 1000), MAX_POLL_MS)
        if self._socket.poll(timeout_ms):
            while True:
                try:
                    frame = self._socket.recv(zmq.NOBLOCK)
                except zmq.Again:
                    break
                messages.append(self._decoder.decode(frame))
        return messages

    def send(self, message: FromEngine) -> None:
        """Queue a message; ZeroMQ's own thread sends it."""
        self._socket.send(encode(message))


def main() -> None:
    """Serve one engine until told to shut down."""
    die_with_parent(int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the server decides when we end
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logs.configure(logs.LogSettings(cast(logs.LogFormat, sys.argv[3]), cast(logs.LogLevel, sys.argv[4])))
    config: EngineConfig = Decoder[EngineConfig](EngineConfig).decode(sys.stdin.buffer.read())
    context: zmq.Context[Any] = zmq.Context()
    socket = connect_pair(context, sys.argv[1])
    socket.linger = 5_000  # milliseconds: the last words, such as Failed, must get through
    try:
        run_engine(config, ZmqChannel(socket))
    finally:
        socket.close()
        context.term()


if __name__ == "__main__":
    main()
