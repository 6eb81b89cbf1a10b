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
    """Makes events of choices; every chunk but the last carries `usage: null` if usage is to come."""

    def __init__(self, envelope: dict[str, Any], *, include_usage: bool) -> None:
        self._head = encode_json(envelope)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}' if include_usage else b"]}"
        self.include_usage = include_usage

    def choice(self, choice: dict[str, Any]) -> bytes:
        """An event with one choice."""
        return event(self._head + encode_json(choice) + self._tail)

    def usage(self, usage: Usage) -> bytes:
        """The event that ends a stream with `stream_options.include_usage`."""
        return event(self._head + b'],"usage":' + encode_json(usage.as_dict()) + b"}")
