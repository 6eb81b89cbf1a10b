"""Answers HEAD wherever GET is answered: the same, without its body, which the server below leaves out.

Knows nothing of routes; plain ASGI. RFC 9110, 9.3.2.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING

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
