"""Refuses heads that are too large with 431 and bodies that are too large with 413, before anything looks at them.

Knows nothing of routes; plain ASGI, so that streams pass through untouched.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException

from shuteye.server.http.errors import http_error

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


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


class BodyLimit:
    """ASGI middleware: a body of more than `max_bytes` raises HTTP 413 where the route reads it.

    Args:
        except_paths: routes that bound what they read by themselves.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, except_paths: frozenset[str] = frozenset()) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.except_paths = except_paths

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Pass the request on, counting what is received."""
        if scope["type"] == "http" and scope["path"] not in self.except_paths:
            receive = limited(scope, receive, max_bytes=self.max_bytes)
        return self.app(scope, receive, send)


def limited(scope: Scope, receive: Receive, *, max_bytes: int) -> Receive:
    """`receive`, which raises HTTP 413 once the body is, or says that it will be, larger."""
    declared = _declared_length(scope)
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        if declared > max_bytes:
            raise _too_large(max_bytes)
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > max_bytes:
            raise _too_large(max_bytes)
        return message

    return counted


def _too_large(max_bytes: int) -> HTTPException:
    return HTTPException(413, f"The request body is over the limit of {max_bytes:,} bytes.")


def _declared_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value) if value.isdigit() else 0
    return 0
