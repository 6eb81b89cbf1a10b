"""A server in a process of its own, over a fake engine: for signals, exit codes and logs."""

from __future__ import annotations

import threading
import time

import httpx2

SERVE = """
import asyncio, sys
from fake_engine import FakeEngine
from shuteye.config import EngineConfig
from shuteye.errors import DescriptorsExhausted, EngineDead, ImageFailure, InvalidRequest
from shuteye.server.config import ServerConfig
from shuteye.server.launch import serve_engine

{before}
options = {options}
engine = FakeEngine(EngineConfig(model="tiny", enable_sleep_mode={sleep_mode}, max_model_len=100000), **options)
code = serve_engine(engine, ServerConfig(**{config}))
print("closed" if engine.status == "closed" else engine.status, flush=True)
sys.exit(code)
"""


def wait_for(condition, what, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.01)


IMPORTED = ("fake_engine", "shuteye.server.run")
"""What takes most of the time of a start; nothing of it runs before `SERVE` does."""


class Process:
    """`serve_engine` in a process of its own.

    Args:
        fork_server: has imported `IMPORTED`.
        options: what its `FakeEngine` is made with, as it stands in the source.
        before: statements to run first.
        config: fields of `ServerConfig`.
    """

    def __init__(self, fork_server, options="{}", *, grace=10, before="", sleep_mode=True, **config):
        config = {"port": 0, "shutdown_grace_s": grace} | config
        source = SERVE.format(options=options, before=before, sleep_mode=sleep_mode, config=config)
        self.process = fork_server.begin(source)
        self.log = ""
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.log += line

    def url(self):
        wait_for(lambda: "Listening on http" in self.log or self.process.poll() is not None, "listening")
        assert "Listening on " in self.log, self.log
        return self.log.partition("Listening on ")[2].partition(";")[0].strip()

    def url_when_ready(self):
        url = self.url()
        wait_for(lambda: httpx2.get(f"{url}/ready").status_code == 200, "readiness")
        return url

    def address(self):
        """Where it listens, as sockets want it."""
        host, _, port = self.url().removeprefix("http://").rpartition(":")
        return host, int(port)

    def end(self):
        code = self.process.wait(timeout=20)
        self.reader.join()
        self.process.stdout.close()
        return code


def streaming(url, results, *, max_tokens):
    """Streams in the background; `results` gets the lines, or the error that ended them."""

    def work():
        try:
            ask = {"prompt": "abc", "stream": True, "max_tokens": max_tokens}
            with httpx2.stream("POST", f"{url}/v1/completions", json=ask, timeout=20) as response:
                results.extend(response.iter_lines())
        except httpx2.HTTPError as error:
            results.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread
