"""What every request goes through before a route sees it: its id, how it is framed, how large and how slow it may be.

Plain ASGI middleware, so that streams pass through untouched: nothing is done per chunk but a comparison or two.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from fastapi import Response
from starlette.exceptions import HTTPException

from shuteye.logs import REQUEST_ID
from shuteye.server.http.errors import ErrorShapes, http_error, in_shape

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_ID_HEADER = b"x-request-id"
_ACCEPTABLE_ID = re.compile(rb"[!-~]{1,128}")
"""What may stand in headers, logs and ids of ours as it came; anything else is replaced."""

_ABSOLUTE = re.compile(r"https?://[^/]*", re.IGNORECASE)

MIN_BYTES_PER_S = 500
"""A body that comes more slowly than this, on average, has stalled, too; as Apache's `RequestReadTimeout` has it."""


class RequestIds:
    """ASGI middleware; `on_answer` is called with each answer's scope and status."""

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
        header = (REQUEST_ID_HEADER, request_id.encode())

        def send_with_id(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), header]
                self.on_answer(scope, message["status"])
            return send(message)

        return self.app(scope, receive, send_with_id)


def given_id(headers: Any) -> str | None:
    """The caller's id; None if there is none that can be used."""
    for name, value in headers:
        if name == REQUEST_ID_HEADER:
            return value.decode() if _ACCEPTABLE_ID.fullmatch(value) else None
    return None


def current_request_id() -> str:
    """The id of the request that is being answered."""
    return REQUEST_ID.get() or uuid4().hex


class RequestTargets:
    """ASGI middleware: the path alone of targets that name scheme and host, too, or begin with a proxy's prefix.

    Servers must take the first (absolute-form, RFC 9112, 3.2.2); of the second, paths without it are as good.
    """

    def __init__(self, app: ASGIApp, *, prefix: str) -> None:
        self.app = app
        self.prefix = prefix

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Pass the request on."""
        if scope["type"] == "http":
            path: str = scope["path"]
            if not path.startswith("/") and (absolute := _ABSOLUTE.match(path)):
                path = f"/{path[absolute.end() :].removeprefix('/')}"
            if self.prefix and path.startswith(f"{self.prefix}/"):
                path = path.removeprefix(self.prefix)
            if path != scope["path"]:
                scope = {**scope, "path": path}
        return self.app(scope, receive, send)


class HeadRequests:
    """ASGI middleware: HEAD is handled as GET."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Pass the request on."""
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        return self.app(scope, receive, send)


class BodyFraming:
    """ASGI middleware: 400 for a Content-Length together with a Transfer-Encoding.

    Args:
        shapes: of errors.
    """

    def __init__(self, app: ASGIApp, *, shapes: ErrorShapes) -> None:
        self.app = app
        self.shapes = shapes

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Pass the request on, or refuse it."""
        refusal = _refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            return self.app(scope, receive, send)
        return in_shape(refusal, scope["path"], self.shapes)(scope, receive, send)


def _refusal(scope: Scope) -> Response | None:
    lengths = 0
    for name, _value in scope["headers"]:
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


class HeaderLimit:
    """ASGI middleware: at most `max_count` headers, of at most `max_bytes` together with the request line.

    Args:
        shapes: of errors.
    """

    def __init__(self, app: ASGIApp, *, max_count: int, max_bytes: int, shapes: ErrorShapes) -> None:
        self.app = app
        self.shapes = shapes
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
            return in_shape(refusal, scope["path"], self.shapes)(scope, receive, send)
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


class PendingBodies:
    """The bodies that one server is waiting for."""

    def __init__(self) -> None:
        self._waits: set[asyncio.Timeout] = set()
        self._given_up = False

    def give_up(self) -> None:
        """Wait for no body any longer, as the server ends: requests without theirs are answered with 408."""
        self._given_up = True
        for wait in self._waits:
            wait.reschedule(asyncio.get_running_loop().time())

    async def part(self, receive: Receive, timeout_s: float) -> Message:
        """The next part of a body.

        Raises:
            TimeoutError: it did not come in time.
        """
        async with asyncio.timeout(0 if self._given_up else timeout_s) as wait:
            self._waits.add(wait)
            try:
                return await receive()
            finally:
                self._waits.discard(wait)


class BodyDeadline:
    """ASGI middleware: a body of which nothing comes for `timeout_s` raises HTTP 408 where the route reads it."""

    def __init__(self, app: ASGIApp, *, timeout_s: float, pending: PendingBodies) -> None:
        self.app = app
        self.timeout_s = timeout_s
        self.pending = pending

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Pass the request on, timing what is received."""
        if scope["type"] == "http":
            receive = self._timed(receive)
        return self.app(scope, receive, send)

    def _timed(self, receive: Receive) -> Receive:
        nbytes, waited_s, whole = 0, 0.0, False
        loop = asyncio.get_running_loop()

        async def timed() -> Message:
            nonlocal nbytes, waited_s, whole
            if whole:
                return await receive()  # returns when the client disconnects
            began = loop.time()
            left_s = self.timeout_s + nbytes / MIN_BYTES_PER_S - waited_s
            try:
                message = await self.pending.part(receive, min(self.timeout_s, left_s))
            except TimeoutError:
                raise HTTPException(408, self._reason(nbytes), headers={"Connection": "close"}) from None
            waited_s += loop.time() - began
            nbytes += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            return message

        return timed

    def _reason(self, nbytes: int) -> str:
        return (
            f"The request's body stopped coming after {nbytes:,} bytes: nothing for {self.timeout_s:g} seconds, less "
            f"than {MIN_BYTES_PER_S} bytes a second, or nothing before the server stopped. Send it again, all of it."
        )
