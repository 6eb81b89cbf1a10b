"""Streamed completions over HTTP/1.1, many at once, costing the measured server's cores as little as possible.

While an answer streams, pieces are only kept with the time they came; everything is parsed afterwards. Knows nothing
of engines.
"""

from __future__ import annotations

import asyncio
import json
import time
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from peers.base import Burst, EngineFailure, EngineHangs, Stream

HOST = "127.0.0.1"


class NotReady(EngineFailure):
    """No connection, or a 5xx: a server that is loading."""


class _Answer(asyncio.Protocol):
    """Keeps what comes, and when, until the server closes the connection."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.pieces: list[bytes] = []
        self.times: list[float] = []
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.times.append(time.perf_counter())
        self.pieces.append(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)


def ask(port: int, path: str, bodies: Sequence[dict[str, Any]], *, timeout_s: float) -> Burst:
    """POST all bodies at once, each on a connection of its own, and read the streams to their ends.

    Raises:
        NotReady: there is no server yet, or it answers with a 5xx.
        EngineHangs: not all answers ended in time.
        EngineFailure: an answer is an error or no stream of completions.
    """
    requests = [_request(path, json.dumps(body).encode()) for body in bodies]
    begin = time.perf_counter()
    answers = asyncio.run(_exchange(port, requests, timeout_s))
    return Burst(begin, tuple(_parsed(answer.pieces, answer.times) for answer in answers))


async def _exchange(port: int, requests: Sequence[bytes], timeout_s: float) -> list[_Answer]:
    loop = asyncio.get_running_loop()
    opened: list[tuple[asyncio.BaseTransport, _Answer]] = []

    async def exchange(request: bytes) -> _Answer:
        transport, answer = await loop.create_connection(lambda: _Answer(request), HOST, port)
        opened.append((transport, answer))
        await answer.closed
        return answer

    try:
        async with asyncio.timeout(timeout_s):
            return await asyncio.gather(*map(exchange, requests))
    except TimeoutError:
        raise EngineHangs(f"no complete answer in {timeout_s:.0f} s") from None
    except OSError as error:
        raise NotReady(f"no connection: {error}") from error
    finally:
        for transport, _ in opened:
            transport.close()


def _request(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


# --- parsing --------------------------------------------------------------------------------------


def _parsed(pieces: Sequence[bytes], times: Sequence[float]) -> Stream:
    """A whole answer, from the status line to the end, as a stream."""
    raw = b"".join(pieces)
    head, separator, _ = raw.partition(b"\r\n\r\n")
    status = head[9:12].decode(errors="replace")
    if not separator or status.startswith("5"):
        raise NotReady(f"HTTP {status or 'without an answer'}: {_excerpt(raw[len(head) :])}")
    if status != "200":
        raise EngineFailure(f"HTTP {status}: {_excerpt(raw[len(head) :])}")
    ends = list(accumulate(map(len, pieces)))
    body, origins = _body(raw, len(head) + 4, chunked=b"transfer-encoding: chunked" in head.lower())
    try:
        events = [(json.loads(text), times[bisect_left(ends, _origin(end, origins))]) for text, end in _events(body)]
        return _stream(events)
    except (ValueError, KeyError, AttributeError) as error:
        raise EngineFailure(f"a stream that cannot be understood: {error!r} in {_excerpt(body)}") from error


def _excerpt(body: bytes) -> str:
    return " ".join(body[:300].decode(errors="replace").split())


def _body(raw: bytes, begin: int, *, chunked: bool) -> tuple[bytes, list[tuple[int, int]]]:
    """The body, and for each of its chunks: where it ends in the body, where it ends in `raw`."""
    if not chunked:
        return raw[begin:], [(len(raw) - begin, len(raw))]
    parts: list[bytes] = []
    origins: list[tuple[int, int]] = []
    length = 0
    while True:
        line_end = raw.find(b"\r\n", begin)
        if line_end < 0:
            raise EngineFailure("the stream was cut off")
        size = int(raw[begin:line_end].split(b";")[0], 16)
        if not size:
            return b"".join(parts), origins
        parts.append(raw[line_end + 2 : line_end + 2 + size])
        length += size
        origins.append((length, line_end + 2 + size))
        begin = line_end + 2 + size + 2


def _origin(end: int, origins: list[tuple[int, int]]) -> int:
    """Where in the raw answer the chunk ends that holds the byte before `end` of the body."""
    if len(origins) == 1:
        body_end, raw_end = origins[0]
        return raw_end - body_end + end
    return origins[bisect_left(origins, (end, 0))][1]


def _events(body: bytes) -> list[tuple[bytes, int]]:
    """Data of the server-sent events, but `[DONE]`, each with the offset where its event ends.

    Comments, with which servers keep a silent connection open, are no data.
    """
    found: list[tuple[bytes, int]] = []
    begin = 0
    for event in body.split(b"\n\n"):
        end = begin + len(event) + 2
        payload = b"".join(line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:"))
        if payload and payload != b"[DONE]":
            found.append((payload, min(end, len(body))))
        begin = end
    return found


def _stream(events: Sequence[tuple[dict[str, Any], float]]) -> Stream:
    """Pieces of text, or the end of a choice, count as arrivals: a token may make no text until others follow."""
    usage: dict[str, Any] | None = None
    arrivals: list[float] = []
    for event, when in events:
        if "error" in event:
            raise EngineFailure(f"an error in the stream: {event['error']}")
        usage = event.get("usage") or usage
        if any(choice.get("text") or choice.get("finish_reason") for choice in event.get("choices", ())):
            arrivals.append(when)
    if usage is None or not arrivals:
        raise EngineFailure(f"a stream without text or usage: {[event for event, _ in events[:2]]}")
    return Stream(tuple(arrivals), usage["prompt_tokens"], usage["completion_tokens"])
