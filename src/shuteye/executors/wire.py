"""The sockets that frames travel on between processes: ZeroMQ pairs, of which neither side blocks or drops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import zmq

S = TypeVar("S", bound=zmq.Socket[Any])


def bind_pair(context: zmq.Context[S], endpoint: str, options: Mapping[int, int | bytes] | None = None) -> S:
    """The side that was there first; `options` of the socket are set before."""
    socket = open_pair(context, options)
    try:
        socket.bind(endpoint)
    except zmq.ZMQError:
        socket.close()
        raise
    return socket


def connect_pair(context: zmq.Context[S], endpoint: str, options: Mapping[int, int | bytes] | None = None) -> S:
    """The side that joins."""
    socket = open_pair(context, options)
    socket.connect(endpoint)
    return socket


def open_pair(context: zmq.Context[S], options: Mapping[int, int | bytes] | None = None) -> S:
    """A socket that is neither side yet."""
    socket = context.socket(zmq.PAIR)
    socket.set_hwm(0)  # never drop or block: the sides bound their own queues
    socket.linger = 0
    for option, value in (options or {}).items():
        socket.setsockopt(option, value)
    return socket
