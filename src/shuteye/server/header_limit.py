"""Refuses requests whose head, the request line and headers, is too large with 431, before anything looks at it.

Knows nothing of routes; plain ASGI. The parser below bounds what it buffers by itself.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING

from shuteye.server.errors import http_error

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send


class HeaderLimit:
    """ASGI middleware: at most `max_count` headers, of at most `max_bytes` together with the request line."""

    def __init__(self, app: ASGIApp, *, max_count: int, max_bytes: int) -> None:
        self.app = app
        self.max_count = max_count
        self.max_bytes = max_bytes

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Pass the request on, or refuse it."""
        if scope["type"] != "http":
            return self.app(scope, receive, send)
        headers = scope["headers"]
        nbytes = _request_line_bytes(scope) + sum(len(name) + len(value) for name, value in headers)
        if len(headers) > self.max_count or nbytes > self.max_bytes:
            seen = f"{len(headers)} headers of {nbytes:,} bytes in all, with the request line"
            refusal = http_error(431, f"{seen}; the limits are {self.max_count} and {self.max_bytes:,}.")
            return refusal(scope, receive, send)
        return self.app(scope, receive, send)


def _request_line_bytes(scope: Scope) -> int:
    """Of method and address."""
    return len(scope["method"]) + len(scope.get("raw_path") or scope["path"]) + len(scope["query_string"])
