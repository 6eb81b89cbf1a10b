"""Request bodies too large to be held twice: received into a file that is gone afterwards.

Knows nothing of what they hold.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Request
from starlette.requests import ClientDisconnect

from shuteye.errors import MemoryExhausted
from shuteye.server.body_limit import limited
from shuteye.server.errors import ClientDisconnected


@asynccontextmanager
async def received_file(request: Request, *, suffix: str, max_bytes: int) -> AsyncIterator[str]:
    """The body as a file, in shared memory where there is some; its path.

    Raises:
        HTTPException: 413, it has more than `max_bytes`.
        MemoryExhausted: there is no room for it.
        ClientDisconnected: the client went before it was whole.
    """
    directory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.NamedTemporaryFile(prefix="shuteye-upload-", suffix=suffix, dir=directory, buffering=0) as file:
        nbytes = 0
        try:
            bounded = Request(request.scope, limited(request.scope, request.receive, max_bytes=max_bytes))
            async for chunk in bounded.stream():
                nbytes += file.write(chunk)
        except OSError as error:
            raise MemoryExhausted(
                f"The upload does not fit in {os.path.dirname(file.name)} ({error.strerror}, after {nbytes:,} bytes); "
                "send a path on the server's host instead."
            ) from error
        except ClientDisconnect:
            raise ClientDisconnected from None
        yield file.name
