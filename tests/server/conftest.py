"""Servers for tests: in process through starlette's client, or live on a port; over whatever `make_engine` makes."""

from __future__ import annotations

import contextlib
import threading
import time
from asyncio import Runner
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_engine import FakeEngine
from fake_engine_server import IMPORTED, Process
from fork_server import ForkServer
from live_server import LiveServer
from starlette.testclient import TestClient

from shuteye.config import EngineConfig
from shuteye.server.app import create_app
from shuteye.server.config import ServerConfig
from shuteye.server.listener import close_listener, open_listener
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
def serve_engine_on() -> Callable[..., Any]:
    """A context in which an engine is served in a thread, wherever its ServerConfig says."""

    @contextlib.contextmanager
    def served(engine: Any, config: ServerConfig) -> Iterator[None]:
        listener, server = open_listener(config), _Server(create_app(engine, config), config)

        def run() -> None:
            with Runner(loop_factory=server.config.get_loop_factory()) as runner:
                runner.run(server.serve_until_stopped(listener))

        thread = threading.Thread(target=run)
        thread.start()
        while not server.context.loading.done:
            time.sleep(0.01)
        yield
        server.should_exit = True
        thread.join(20)
        close_listener(listener, config)

    return served


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    server = ForkServer(*IMPORTED)
    yield server
    server.close()


@pytest.fixture
def serve(fork_server: ForkServer) -> Iterator[Callable[..., Process]]:
    """Starts servers in processes of their own; kills those that a test leaves."""
    started: list[Process] = []

    def start(options: str = "{}", **config: Any) -> Process:
        started.append(Process(fork_server, options, **config))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.end()
