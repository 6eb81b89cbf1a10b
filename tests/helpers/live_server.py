"""A server on a port of 127.0.0.1, run by a thread of this process, over whatever engine it is given."""

from __future__ import annotations

import threading
import time
from asyncio import Runner
from typing import Any

import httpx2

from shuteye.server.app import create_app
from shuteye.server.config import ServerConfig
from shuteye.server.listener import open_listener
from shuteye.server.run import _Server


class LiveServer:
    """A server on a port of 127.0.0.1, run by a thread."""

    def __init__(self, engine: Any, **config: Any) -> None:
        self.config = ServerConfig(port=0, **({"dev_mode": True, "shutdown_grace_s": 2} | config))
        self.listener = open_listener(self.config)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.server = _Server(create_app(engine, self.config), self.config)
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
