"""Writes the chunks of a stream: JSON whose constant parts are encoded once, not once per token.

Knows nothing of what a choice holds.
"""

from __future__ import annotations

from typing import Any

import msgspec

from shuteye.server.protocol.usage import Usage
from shuteye.server.sse import event

encode_json = msgspec.json.Encoder().encode


class ChunkWriter:
    """Makes events of choices; if usage is to come, every chunk but the last carries `usage: null`, or usage so far."""

    def __init__(self, envelope: dict[str, Any], *, include_usage: bool, continuous_usage: bool = False) -> None:
        self._head = encode_json(envelope)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}' if include_usage else b"]}"
        self.include_usage = include_usage
        self.continuous_usage = continuous_usage

    def choice(self, choice: dict[str, Any], usage: Usage | None = None, extra: dict[str, Any] | None = None) -> bytes:
        """An event with one choice, and perhaps with the usage so far and other fields."""
        tail = self._tail if usage is None else b'],"usage":' + encode_json(usage.as_dict()) + b"}"
        if extra:
            tail = tail[:-1] + b"," + encode_json(extra)[1:]
        return event(self._head + encode_json(choice) + tail)

    def usage(self, usage: Usage) -> bytes:
        """The event that ends a stream with `stream_options.include_usage`."""
        return event(self._head + b'],"usage":' + encode_json(usage.as_dict()) + b"}")
