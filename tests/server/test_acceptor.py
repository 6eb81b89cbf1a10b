"""Connections for which there is no descriptor: they wait, somebody is told, and it goes on by itself."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from typing import ClassVar

import httpx2
import pytest
import uvloop
from fake_engine_server import wait_for
from stalling_clients import HALF_A_HEAD, Client

from shuteye import processes as descriptors
from shuteye.server import connections as module
from shuteye.server.connections import RESERVED_DESCRIPTORS, Acceptor


class Listener(socket.socket):
    """One whose first calls of `accept` fail."""

    failures: list[int]

    def accept(self):
        if self.failures:
            raise OSError(self.failures.pop(), "made up")
        return super().accept()


class Greeter(asyncio.Protocol):
    """Says one byte, and counts itself."""

    open: ClassVar[set[Greeter]] = set()

    def connection_made(self, transport):
        self.open.add(self)
        transport.write(b"x")

    def connection_lost(self, _error):
        self.open.discard(self)


def greeted(count, *, failures=(), leaving=0):
    """How many of `count` clients are greeted, the first `leaving` of them gone after a while."""

    async def scenario():
        with Listener() as listener, contextlib.ExitStack() as stack:
            listener.failures = list(failures)
            listener.bind(("127.0.0.1", 0))
            listener.listen(count)
            acceptor = Acceptor(listener, Greeter, num_open=lambda: len(Greeter.open))
            clients = [stack.enter_context(socket.create_connection(listener.getsockname(), 10)) for _ in range(count)]
            for client in clients:
                client.setblocking(False)
            loop = asyncio.get_running_loop()
            first, rest = clients[: leaving or count], clients[leaving or count :]
            got = [await asyncio.wait_for(loop.sock_recv(client, 1), 20) for client in first]
            for client in first:
                client.close()
            got += [await asyncio.wait_for(loop.sock_recv(client, 1), 20) for client in rest]
            acceptor.close()
            while Greeter.open:
                for client in rest:
                    client.close()
                await asyncio.sleep(0.01)
            return got.count(b"x")

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(scenario())


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.EPROTO])
def test_accepting_goes_on_after_an_error(error, caplog, monkeypatch):
    """A server that never accepts again; one that says nothing, or says it ten times a second."""
    monkeypatch.setattr(module, "PAUSE_S", 0.01)
    assert greeted(3, failures=[error] * 4) == 3
    assert caplog.text.count("No new connections are taken") == 1
    assert ("file descriptors" in caplog.text) is (error in (errno.EMFILE, errno.ENFILE))


def test_a_connection_reset_before_it_was_accepted_is_ignored(caplog):
    """A pause because of one client."""
    assert greeted(2, failures=[errno.ECONNABORTED, errno.EAGAIN]) == 2
    assert not caplog.text


def test_some_descriptors_are_left_to_the_server(caplog, monkeypatch):
    """Connections that take the descriptors which the restart of an engine needs."""
    monkeypatch.setattr(module, "PAUSE_S", 0.01)
    monkeypatch.setattr(descriptors, "limit", lambda: RESERVED_DESCRIPTORS + 2)
    assert greeted(4, leaving=2) == 4
    assert "2 are open, as many as there are file descriptors for" in caplog.text


def test_a_server_out_of_descriptors_accepts_again_once_some_are_free(serve):
    """Silence, once a hundred connections stall: nobody is answered, and nothing is logged."""
    limit = 60
    before = (
        f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))\n"
        "import shuteye.server.connections as connections; connections.RESERVED_DESCRIPTORS = 20"
    )
    server = serve(before=before, header_timeout_s=0.5)
    url = server.url_when_ready()
    with contextlib.ExitStack() as stack:
        for _ in range(limit + 20):
            stack.enter_context(Client(server.address(), HALF_A_HEAD))
        assert httpx2.get(f"{url}/ping", timeout=60).status_code == 200
    wait_for(lambda: "No new connections are taken" in server.log, "a line in the log")
    assert server.log.count("No new connections") == 1
