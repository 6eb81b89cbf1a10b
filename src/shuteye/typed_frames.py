"""Typed frames between processes: dataclasses and Structs as msgpack by msgspec, checked when read. No pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

T = TypeVar("T")


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
