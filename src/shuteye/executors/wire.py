"""Typed frames between processes: msgpack by msgspec over a ZeroMQ pair. No pickle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
import zmq

T = TypeVar("T")
S = TypeVar("S", bound=zmq.Socket[Any])


def _encode_extra(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot travel between processes")


def _decode_extra(kind: type, value: Any) -> Any:
    if kind is Path:
        return Path(value)
    raise TypeError(f"{kind.__name__} cannot travel between processes")


def encode(value: Any) -> bytes:
    """Any dataclass or Struct as one frame."""
    return msgspec.msgpack.encode(value, enc_hook=_encode_extra)


class Decoder(Generic[T]):
    """Frames back into one type, or into one union of tagged Structs."""

    def __init__(self, kind: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(kind, dec_hook=_decode_extra)

    def decode(self, frame: bytes) -> T:
        """One frame, checked against the type."""
        return self._decoder.decode(frame)


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
