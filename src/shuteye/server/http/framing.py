"""How a request is framed: HEAD wherever there is a GET, one length of a body, and no encoding of it.

Knows nothing of routes; plain ASGI.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING

from fastapi import Response

from shuteye.server.http.errors import http_error

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send


class HeadRequests:
    """ASGI middleware: whatever is within takes HEAD for GET."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Pass the request on."""
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        return self.app(scope, receive, send)


class BodyFraming:
    """ASGI middleware: 415 for a Content-Encoding, 400 for a Content-Length together with a Transfer-Encoding."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Pass the request on, or refuse it."""
        refusal = _refusal(scope) if scope["type"] == "http" else None
        return (refusal or self.app)(scope, receive, send)


def _refusal(scope: Scope) -> Response | None:
    lengths = 0
    for name, value in scope["headers"]:
        if name == b"content-encoding" and value.strip().lower() not in {b"", b"identity"}:
            coding = value.decode("latin-1")
            return http_error(
                415,
                f"Content-Encoding: {coding} is not supported; send the body as it is, without Content-Encoding.",
                {"Accept-Encoding": "identity"},
            )
        lengths |= {b"content-length": 1, b"transfer-encoding": 2}.get(name, 0)
    if lengths != 3:
        return None
    # The parser goes by Transfer-Encoding. A proxy that went by the other one sees other requests on this connection
    # than we do (RFC 9112, 6.1), so nothing more is read from it.
    return http_error(
        400,
        "The request has both Content-Length and Transfer-Encoding, so that its end is in doubt; send one of them.",
        {"Connection": "close"},
    )
