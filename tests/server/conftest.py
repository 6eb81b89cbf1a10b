"""Servers for tests: in process through starlette's client, or live on a port; over whatever `make_engine` makes."""

from __future__ import annotations

import contextlib
import threading
import time
from asyncio import Runner
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest
from fake_engine import FakeEngine
from fake_engine_server import Process
from starlette.testclient import TestClient

from shuteye.config import EngineConfig
from shuteye.server.app import create_app
from shuteye.server.config import ServerConfig
from shuteye.server.connections import open_listener
from shuteye.server.run import _Server

ENGINE_FIELDS = frozenset(EngineConfig.__dataclass_fields__)
MODEL = "tiny"


@pytest.fixture
def make_engine() -> Callable[..., FakeEngine]:
    """Makes engines from EngineConfig fields; the one place that knows which engine the server tests use."""

    def make(**options: Any) -> FakeEngine:
        config = {name: value for name, value in options.items() if name in ENGINE_FIELDS}
        return FakeEngine(
            EngineConfig(**({"model": MODEL, "enable_sleep_mode": True} | config)),
            **{name: value for name, value in options.items() if name not in ENGINE_FIELDS},
        )

    return make


@pytest.fixture
def client_of() -> Iterator[Callable[..., TestClient]]:
    """Opens a client on an engine, with ServerConfig fields; waits until it is ready."""
    with contextlib.ExitStack() as stack:

        def open_client(engine: Any, *, wait: bool = True, **config: Any) -> TestClient:
            app = create_app(engine, ServerConfig(**({"dev_mode": True} | config)))
            client = stack.enter_context(TestClient(app, "http://localhost", raise_server_exceptions=False))
            while wait and client.get("/ready").status_code != 200:
                time.sleep(0.002)
            return client

        yield open_client


@pytest.fixture
def engine(make_engine: Callable[..., FakeEngine]) -> FakeEngine:
    return make_engine()


@pytest.fixture
def client(engine: FakeEngine, client_of: Callable[..., TestClient]) -> TestClient:
    return client_of(engine)


class LiveServer:
    """A server on a port of 127.0.0.1, run by a thread."""

    def __init__(self, engine: Any, **config: Any) -> None:
        self.config = ServerConfig(port=0, **({"dev_mode": True, "shutdown_grace_s": 2} | config))
        self.listener = open_listener(self.config)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.server = _Server(engine, self.config)
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with self.listener, Runner(loop_factory=self.server.config.get_loop_factory()) as runner:
            runner.run(self.server.serve_until_stopped(self.listener))

    def wait_ready(self) -> None:
        deadline = time.monotonic() + 60
        while httpx2.get(f"{self.url}/ready").status_code != 200:
            assert time.monotonic() < deadline, "the server did not become ready"
            time.sleep(0.01)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(timeout=20)
        assert not self.thread.is_alive(), "the server did not stop"


@pytest.fixture
def live() -> Iterator[Callable[..., LiveServer]]:
    """Opens live servers; waits until they are ready, stops them afterwards."""
    servers: list[LiveServer] = []

    def open_server(engine: Any, **config: Any) -> LiveServer:
        server = LiveServer(engine, **config)
        servers.append(server)
        server.thread.start()
        server.wait_ready()
        return server

    yield open_server
    for server in servers:
        server.stop()


@pytest.fixture
def serve() -> Iterator[Callable[..., Process]]:
    """Starts servers in processes of their own; kills those that a test leaves."""
    started: list[Process] = []

    def start(options: str = "{}", **config: Any) -> Process:
        started.append(Process(options, **config))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.end()
