"""Clients that send half of a request, and keep the connection."""

from __future__ import annotations

import asyncio
import time

import httpx2
import pytest
from stalling_clients import HALF_A_BODY, HALF_A_CONTROL_CALL, HALF_A_HEAD, WHOLE, Client, head
from starlette.exceptions import HTTPException

from shuteye.server.http.middleware import MIN_BYTES_PER_S, BodyDeadline, PendingBodies


@pytest.fixture
def address(make_engine, live):
    server = live(make_engine(), header_timeout_s=0.2, body_timeout_s=0.2)
    return server.listener.getsockname()


@pytest.mark.parametrize("before", [b"", WHOLE], ids=["first", "next"])
def test_half_a_head_is_answered_and_closed(address, before):
    """A connection that is never closed, and a server that runs out of descriptors."""
    with Client(address, before) as client:
        if before:
            client.begins()
        client.socket.sendall(HALF_A_HEAD)
        *_, answer = client.answer().partition(b"HTTP/1.1 408 ")
        assert b"head was not whole after 0.2 seconds" in answer
        assert b'"type": "RequestTimeoutError"' in answer
        assert b"connection: close" in answer.lower()


def test_a_silent_connection_is_closed_without_an_answer(address):
    """A connection that is opened and left; an answer to a question that nobody asked."""
    with Client(address) as client:
        assert client.answer() == b""


def test_a_head_that_trickles_is_no_progress(address):
    """A deadline that every byte puts off."""
    with Client(address) as client:
        began = time.monotonic()
        for byte in (HALF_A_HEAD * 1000)[: 30 * 100]:
            try:
                client.socket.sendall(bytes([byte]))
            except OSError:
                break
            time.sleep(0.01)
        assert time.monotonic() - began < 25, "it was never closed"


@pytest.mark.parametrize("sent", [HALF_A_BODY, HALF_A_CONTROL_CALL, head("/update_weights", 9).encode() + b"{"])
def test_half_a_body_is_answered_counted_and_closed(make_engine, live, sent):
    """A request that never ends; one that counts as a bug of ours."""
    server = live(make_engine(), body_timeout_s=0.2)
    with Client(server.listener.getsockname(), sent) as client:
        answer = client.answer()
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"type": "RequestTimeoutError"' in answer
    assert b"x-request-id" in answer
    assert 'status="408"} 1.0' in httpx2.get(f"{server.url}/metrics").text


def test_the_rest_of_a_body_that_was_refused_has_a_deadline_too(address):
    """A connection held by a body that nobody reads, a byte at a time."""
    with Client(address, head("/nowhere", 1000).encode() + b"{") as client:
        client.begins()
        client.socket.sendall(b"x")  # ends uvicorn's keep-alive timeout
        assert b"404 Not Found" in client.answer()


def test_an_idle_connection_is_kept_and_used_again(make_engine, live):
    """A deadline for heads that cuts connections between two requests, or during a long answer."""
    server = live(make_engine(token_delay_s=0.02), header_timeout_s=0.2)
    with httpx2.Client(base_url=server.url) as client:
        for _ in range(3):
            assert client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 15}).status_code == 200
            time.sleep(0.3)
    assert server.server.server_state.total_requests >= 3


# --- bodies, on a clock that is set ahead -------------------------------------------------------


class Clock(asyncio.SelectorEventLoop):
    """A loop whose time goes on by itself, and is set ahead."""

    ahead_s = 0.0

    def time(self):
        return super().time() + self.ahead_s


def read(parts, *, pending=None):
    """The body that a route gets if each part, bytes after seconds, comes as given; None for what never comes."""

    async def scenario():
        loop = asyncio.get_running_loop()
        coming = iter(parts)

        async def receive():
            seconds, body = next(coming)
            loop.ahead_s += seconds
            await asyncio.sleep(0.002)
            if body is None:
                await asyncio.Event().wait()
            return {"type": "http.request", "body": body, "more_body": bool(body)}

        got = b""

        async def app(_scope, receive, _send):
            nonlocal got
            while part := (await receive())["body"]:
                got += part

        await BodyDeadline(app, timeout_s=30.0, pending=pending or PendingBodies())({"type": "http"}, receive, None)
        return got

    with asyncio.Runner(loop_factory=Clock) as runner:
        return runner.run(scenario())


def test_a_body_that_goes_on_may_take_long():
    """Large uploads over slow lines, cut in the middle."""
    parts = [(25.0, b"x" * 25 * MIN_BYTES_PER_S)] * 20
    assert len(read([*parts, (25.0, b"")])) == 20 * 25 * MIN_BYTES_PER_S


@pytest.mark.parametrize("parts", [[(31.0, b"x")], [(29.0, b"x")] * 3, [(1.0, b"x" * 10**6), (31.0, b"x")]])
def test_a_body_that_stalls_or_trickles_is_ended(parts):
    """A place held for ever by a byte now and then, or by a good beginning."""
    with pytest.raises(HTTPException, match="stopped coming") as ended:
        read([*parts, (0.0, b"")])
    assert ended.value.status_code == 408


def test_open_connections_are_dropped_once_the_server_gives_up_waiting():
    """Bodies that begin to be read after the grace."""
    pending = PendingBodies()
    pending.give_up()
    with pytest.raises(HTTPException, match="before the server stopped"):
        read([(0.0, None)], pending=pending)
