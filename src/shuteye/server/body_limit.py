"""Refuses request bodies over a limit with 413, before or while they are read.

Knows nothing of routes; plain ASGI, so that streams pass through untouched.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


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
