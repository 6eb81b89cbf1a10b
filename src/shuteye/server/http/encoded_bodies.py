"""Bodies with a Content-Encoding: gzip of JSON is inflated as it is read, and never to more than JSON may have.

Knows nothing of JSON. A thousandth of what it stands for is enough for gzip: nothing is inflated before somebody reads
it, and no more than one slice at a time.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable
from typing import TYPE_CHECKING

from fastapi import Response
from starlette.exceptions import HTTPException

from shuteye.server.http.errors import ErrorShapes, http_error, in_shape

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

SLICE_BYTES = 256 * 1024
"""Inflated at a time: about a millisecond in which nothing else is done."""

_GZIP = frozenset({b"gzip", b"x-gzip"})  # RFC 9110, 8.4.1.3
_NO_JSON = (b"multipart/", b"audio/", b"application/octet-stream")
_OF_THE_WIRE = frozenset({b"content-encoding", b"content-length"})
"""Headers that say nothing of an inflated body."""


class EncodedBodies:
    """ASGI middleware: inflates bodies of JSON that are gzipped; 415 for other bodies and other encodings.

    Args:
        max_bytes: of an inflated body; 413 where more of it is read.
        shapes: of errors.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, shapes: ErrorShapes) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.shapes = shapes

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Pass the request on, or refuse it."""
        codings = _codings(scope) if scope["type"] == "http" else []
        if not codings:
            return self.app(scope, receive, send)
        refusal = _refusal(codings, scope)
        if refusal is not None:
            return in_shape(refusal, scope["path"], self.shapes)(scope, receive, send)
        headers = [(name, value) for name, value in scope["headers"] if name not in _OF_THE_WIRE]
        return self.app({**scope, "headers": headers}, _Inflated(receive, max_bytes=self.max_bytes), send)


def _codings(scope: Scope) -> list[bytes]:
    """What a body went through, in this order; identity is nothing."""
    named = [
        coding.strip().lower()
        for name, value in scope["headers"]
        if name == b"content-encoding"
        for coding in value.split(b",")
    ]
    return [coding for coding in named if coding not in {b"", b"identity"}]


def _refusal(codings: list[bytes], scope: Scope) -> Response | None:
    given = b", ".join(codings).decode("latin-1")
    if len(codings) > 1 or codings[0] not in _GZIP:
        message = f"Content-Encoding: {given} is not supported; send the body as it is, or once through gzip."
        return http_error(415, message, {"Accept-Encoding": "gzip, identity"})
    kind = next((value for name, value in scope["headers"] if name == b"content-type"), b"").strip().lower()
    if kind.startswith(_NO_JSON):
        shown = kind.split(b";")[0].decode("latin-1")
        message = f"Content-Encoding: {given} is supported for JSON, not for {shown}; send the body as it is."
        return http_error(415, message, {"Accept-Encoding": "identity"})
    return None


class _Inflated:
    """A `receive` that gives the inflated body, slice by slice, of one that gives the gzipped one."""

    def __init__(self, receive: Receive, *, max_bytes: int) -> None:
        self._receive = receive
        self._inflater = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)  # with gzip's header and checksum
        self._waiting = b""  # gzipped bytes that have come
        self._more = True  # of those
        self._whole = False
        self._max_bytes = self._left = max_bytes

    async def __call__(self) -> Message:
        """The next slice.

        Raises:
            HTTPException: 413, the body is too large; 400, it is not gzip.
        """
        if self._whole:
            return await self._receive()  # returns when the client disconnects
        if not self._waiting and self._more:
            message = await self._receive()
            if message["type"] != "http.request":
                return message
            self._waiting, self._more = message.get("body", b""), message.get("more_body", False)
        else:
            await asyncio.sleep(0)  # others have their turn between two slices of ours
        body = self._next_slice()
        self._whole = not self._more and not self._waiting
        if self._whole and not self._inflater.eof:
            raise HTTPException(400, "The body is not whole: its gzip ends early.")
        return {"type": "http.request", "body": body, "more_body": not self._whole}

    def _next_slice(self) -> bytes:
        try:
            body = self._inflater.decompress(self._waiting, SLICE_BYTES)
        except zlib.error as error:
            raise HTTPException(400, f"The body is not gzip, as its Content-Encoding says: {error}.") from error
        self._waiting = self._inflater.unconsumed_tail
        if self._inflater.unused_data:
            raise HTTPException(400, "The body goes on behind the end of its gzip; send one gzip stream.")
        self._left -= len(body)
        if self._left < 0:
            raise HTTPException(413, f"The JSON has more than {self._max_bytes:,} bytes, once it is inflated.")
        return body
