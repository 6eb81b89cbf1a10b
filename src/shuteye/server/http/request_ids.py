"""Gives every HTTP request an id: the caller's X-Request-Id, or a new one; it is in the answer, in logs and in traces.

Knows nothing of routes; plain ASGI, and nothing is done per chunk of a stream but one comparison.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from shuteye.logs import REQUEST_ID

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = b"x-request-id"
_ACCEPTABLE = re.compile(rb"[!-~]{1,128}")
"""What may stand in headers, logs and ids of ours as it came; anything else is replaced."""


class RequestIds:
    """ASGI middleware; `on_answer` is told of each answer's scope and status."""

    def __init__(self, app: ASGIApp, *, on_answer: Callable[[Scope, int], None]) -> None:
        self.app = app
        self.on_answer = on_answer

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Pass the request on under its id."""
        if scope["type"] != "http":
            return self.app(scope, receive, send)
        given = given_id(scope["headers"])
        request_id = uuid4().hex if given is None else given
        REQUEST_ID.set(request_id)  # for this task alone: each request has one
        header = (HEADER, request_id.encode())

        def send_with_id(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), header]
                self.on_answer(scope, message["status"])
            return send(message)

        return self.app(scope, receive, send_with_id)


def given_id(headers: Any) -> str | None:
    """The caller's id; None if there is none that can be used."""
    for name, value in headers:
        if name == HEADER:
            return value.decode() if _ACCEPTABLE.fullmatch(value) else None
    return None


def current_request_id() -> str:
    """The id of the request that is being answered."""
    return REQUEST_ID.get() or uuid4().hex
