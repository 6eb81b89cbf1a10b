"""Request bodies too large to be held twice: received into a file that nobody finds, gone afterwards.

Knows nothing of what they hold.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Request
from starlette.requests import ClientDisconnect

from shuteye.errors import MemoryExhausted
from shuteye.executors.handover import NamelessFile
from shuteye.server.body_limit import limited
from shuteye.server.errors import ClientDisconnected


@asynccontextmanager
async def received_file(request: Request, *, max_bytes: int) -> AsyncIterator[str]:
    """The body as a file without a name, in shared memory where there is some; a path for processes of this user.

    The path is good only within the context: leave it when nobody will open the path any more.

    Raises:
        HTTPException: 413, it has more than `max_bytes`.
        MemoryExhausted: there is no room for it.
        ClientDisconnected: the client went before it was whole.
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
