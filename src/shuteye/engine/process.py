"""The engine in a process of its own: what a fork of the zygote does.

It reads an `EngineStart`, one message, from its order's channel; the end of that channel means that it is not needed.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from types import FrameType
from typing import Any

import zmq

from shuteye import logs
from shuteye.engine.forking import LONGEST, ForkOrder, announce
from shuteye.engine.liveness import Pulse
from shuteye.engine.loop import run_engine
from shuteye.engine.messages import Connected, FromEngine, ToEngine
from shuteye.engine.start import EngineStart
from shuteye.executors import computing_here
from shuteye.executors.wire import connect_pair
from shuteye.processes import end_with_pipe, name_process
from shuteye.typed_frames import Decoder, encode

MAX_POLL_MS = 1 << 30
RECONNECT_MS = 10
"""How soon the socket looks again for its other end, which may not be there yet."""


class ZmqChannel:
    """The engine's end of a ZeroMQ pair (see `loop.Channel`)."""

    def __init__(self, socket: zmq.Socket[Any], pulse: Pulse) -> None:
        self._socket = socket
        self._pulse = pulse
        self._decoder: Decoder[ToEngine] = Decoder(ToEngine)
        self._woken = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(self._woken, zmq.POLLIN)

    def receive(self, timeout_s: float | None) -> Sequence[ToEngine]:
        """Everything that has arrived; waits for the first message."""
        self._pulse.waiting()
        try:
            return self._received(timeout_s)
        finally:
            self._pulse.working()

    def _received(self, timeout_s: float | None) -> list[ToEngine]:
        messages: list[ToEngine] = []
        timeout_ms = None if timeout_s is None else min(int(timeout_s * 1000), MAX_POLL_MS)
        ready = dict(self._poller.poll(timeout_ms))
        if self._woken in ready:
            os.eventfd_read(self._woken)
        if self._socket in ready:
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

    def wake(self) -> None:
        """See `loop.Channel`."""
        os.eventfd_write(self._woken, 1)


def _stop_loading_on_sigterm(pulse: Pulse) -> None:
    """Let SIGTERM end us, with all that is half-written swept away, until we listen to what the server says."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        if pulse.turns == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            sys.exit(0)

    signal.signal(signal.SIGTERM, stop)


def serve(order: ForkOrder, torch_orders: socket.socket) -> None:
    """Serve one engine until told to shut down.

    Args:
        torch_orders: where to hand on the order of an engine that computes with torch; closed in a process that has it.
    """
    name_process("shuteye-engine")
    end_with_pipe(order.lifeline_fd)
    pulse = Pulse(order.pulse_fd)
    pulse.beat_in_background()
    _stop_loading_on_sigterm(pulse)
    told = order.told or order.channel.recv(LONGEST)
    if not told:
        return
    start = Decoder[EngineStart](EngineStart).decode(told)
    logs.configure(start.logs)
    if torch_orders.fileno() >= 0:
        with torch_orders:
            computing = computing_here(start.config)
            if computing != "native":
                replace(order, told=told, needs=computing).send(torch_orders)
                return
    gc.enable()
    announce(order.channel)
    _run(start, order.endpoint, pulse)


def _run(start: EngineStart, endpoint: str, pulse: Pulse) -> None:
    context: zmq.Context[Any] = zmq.Context()
    socket = connect_pair(context, endpoint, {zmq.RECONNECT_IVL: RECONNECT_MS})
    socket.linger = 5_000  # milliseconds: the last words, such as Failed, must get through
    channel = ZmqChannel(socket, pulse)
    channel.send(Connected())
    try:
        run_engine(start.config, channel)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        socket.close()
        context.term()
