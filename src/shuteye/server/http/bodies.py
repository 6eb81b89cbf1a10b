"""Request bodies as this server takes them: JSON of bounded length, depth and number of parts; large ones into a file.

Knows nothing of fields. Code after these checks may recurse into a body, show it, or send it on.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from shuteye.errors import InvalidRequest, MemoryExhausted
from shuteye.handover import NamelessFile
from shuteye.server.http.errors import ClientDisconnected
from shuteye.server.http.middleware import limited

if TYPE_CHECKING:
    from starlette.types import Receive, Scope


MAX_DEPTH = 128
"""Arrays and objects within each other; Python's own functions give up at about 1,000."""

MAX_CONTAINERS = 50_000
"""Arrays and objects in all: each costs the event loop some microseconds until it is validated."""

_NOT_STRUCTURE = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[^][{}"]++', re.DOTALL)
"""Strings, closed or not, and all other bytes that are no brackets: what remains is the structure."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class JsonRequest(Request):
    """A request whose `json()` refuses what `parsed` refuses, for routes that have FastAPI read their body."""

    def __init__(self, scope: Scope, receive: Receive, *, max_bytes: int) -> None:
        super().__init__(scope, receive)
        self._max_bytes = max_bytes

    async def json(self) -> Any:
        """The body. Errors are raised as HTTP's own: FastAPI would replace ours by one without a reason."""
        if not hasattr(self, "_json"):
            try:
                self._json = parsed(await self.body(), max_bytes=self._max_bytes)
            except InvalidRequest as error:
                raise HTTPException(400, error.message) from error
        return self._json


def parsed(body: bytes, *, max_bytes: int | None = None, what: str = "The body") -> Any:
    """What the body, or some other text that errors call `what`, says.

    Raises:
        HTTPException: 413, it is longer than `max_bytes`.
        InvalidRequest: it is not JSON, or has more parts or more depth than can be looked through in time.
    """
    if max_bytes is not None and len(body) > max_bytes:
        raise HTTPException(413, f"The JSON has {len(body):,} bytes, over the limit of {max_bytes:,} bytes.")
    _check_structure(body, what)
    try:
        found = json.loads(body.decode("utf-8-sig"), parse_constant=_refuse_constant)
        if _SURROGATE.search(body):
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{what} is not valid JSON: {error}.") from error
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{what} has text that is not Unicode: half of a surrogate pair ({error.object[error.start]!r})."
        ) from error
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"{what} is not valid JSON: {error.msg} at character {error.pos}.") from error
    except ValueError as error:  # a constant, or a number of thousands of digits
        raise InvalidRequest(f"{what} is not valid JSON: {error}.") from error
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _check_structure(body: bytes, what: str) -> None:
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:  # most bodies: too few brackets, even with those in strings
        return
    structure = _NOT_STRUCTURE.sub(b"", body)
    count = structure.count(b"[") + structure.count(b"{")
    if count > MAX_CONTAINERS:
        raise InvalidRequest(f"{what} has {count:,} arrays and objects; at most {MAX_CONTAINERS:,} are taken.")
    depth = 0
    for bracket in structure:
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_DEPTH:
            raise InvalidRequest(f"{what} is nested more than {MAX_DEPTH} arrays and objects deep.")


@asynccontextmanager
async def received_file(request: Request, *, max_bytes: int) -> AsyncIterator[str]:
    """The body as a file without a name, in shared memory where there is some; a path for processes of this user.

    The path is good only within the context: leave it when nobody will open the path any more.

    Raises:
        HTTPException: 413, it has more than `max_bytes`.
        MemoryExhausted: there is no room for it.
        ClientDisconnected: the client disconnected before it was complete.
    """
    nbytes = 0
    with contextlib.ExitStack() as stack:
        try:
            file = NamelessFile()
            stack.callback(file.close)
            bounded = Request(request.scope, limited(request.scope, request.receive, max_bytes=max_bytes))
            async for chunk in bounded.stream():
                nbytes += file.write(chunk)
        except OSError as error:
            raise MemoryExhausted(
                f"The upload does not fit in shared memory ({error.strerror}, after {nbytes:,} bytes); "
                "send a path on the server's host instead."
            ) from error
        except ClientDisconnect:
            raise ClientDisconnected from None
        yield file.path
