"""What engines with a server have in common: a port, completions over HTTP, and requests repeated until it serves.

Knows nothing of any engine's flags or of how it sleeps.
"""

from __future__ import annotations

import http.client
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints import Checkpoint
from peers import streaming
from peers.base import LEVEL_SETTINGS, Burst, EngineFailure, EngineHangs
from peers.process import Process, free_port, wait_until

START_TIMEOUT_S = 300.0


class HttpEngine(ABC):
    """A server in a process of its own. Subclasses say how it is started and what its requests need.

    Args:
        level: the instruction set that it is held to; None takes whatever the processor has.
    """

    over_http = True
    sleeps: str | None = None
    start_timeout_s = START_TIMEOUT_S

    def __init__(self, checkpoint: Checkpoint, logs: Path, level: str | None = None) -> None:
        self.checkpoint = checkpoint
        self.level = level
        self.log = logs / f"{type(self).__name__.lower()}.log"
        self.port = 0
        self._process: Process | None = None

    @abstractmethod
    def arguments(self) -> list[str]:
        """The command line, without the port."""

    @property
    def served(self) -> Path:
        """The model's name in requests."""
        return self.checkpoint.directory

    @property
    def environment(self) -> Mapping[str, str]:
        return LEVEL_SETTINGS.get(self.level or "", {})

    @property
    def fields(self) -> Mapping[str, Any]:
        """What this server needs in a request, beside the prompt and `max_tokens`."""
        return {"stream_options": {"include_usage": True}, "ignore_eos": True}

    def command(self) -> str:
        settings = [f"{name}={value}" for name, value in self.environment.items()]
        return " ".join([*settings, *self.arguments(), "--port", "PORT"]).replace(str(Path.home()), "~")

    def prepare(self) -> None:
        """Read the checkpoint once, so that the first start finds it in the page cache as later ones do."""
        for path in sorted(self.checkpoint.directory.iterdir()):
            path.read_bytes()

    @property
    def process(self) -> Process:
        assert self._process is not None, "not started"
        return self._process

    def start(self, prompt: str) -> float:
        begin = time.perf_counter()
        self.port = free_port()
        self._process = Process(
            [*self.arguments(), "--port", str(self.port)], log=self.log, environment=self.environment
        )
        return self._first_token_s(begin, prompt, deadline=begin + self.start_timeout_s)

    def _first_token_s(self, begin: float, prompt: str, *, deadline: float) -> float:
        """Seconds from `begin` to the first token of a request that is repeated until the server takes it."""
        while True:
            try:
                left_s = deadline - time.perf_counter()
                burst = self.ask([prompt], max_tokens=1, timeout_s=max(left_s, 0.01))
            except streaming.NotReady as refusal:
                self.process.check_alive()
                if time.perf_counter() > deadline:
                    raise EngineHangs(f"not serving after {deadline - begin:.0f} s: {refusal}") from refusal
                wait_until(deadline)
            else:
                return burst.streams[0].arrivals_s[0] - begin

    def ask(self, prompts: list[str], *, max_tokens: int, timeout_s: float) -> Burst:
        common = {"model": str(self.served), "max_tokens": max_tokens, "temperature": 0, "stream": True}
        bodies = [common | dict(self.fields) | {"prompt": prompt} for prompt in prompts]
        return streaming.ask(self.port, "/v1/completions", bodies, timeout_s=timeout_s)

    def memory_bytes(self) -> int:
        return self.process.memory_bytes()

    def disk_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.checkpoint.directory.glob("*.safetensors"))

    def sleep(self) -> float | None:
        raise EngineFailure("has no sleep")

    def wake(self, prompt: str, *, timeout_s: float) -> float:
        """By asking: a request wakes it."""
        burst = self.ask([prompt], max_tokens=1, timeout_s=timeout_s)
        return burst.first_token_s

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop()
            self._process = None

    def call(self, method: str, path: str, *, timeout_s: float = 60.0) -> dict[str, Any]:
        """A control route's JSON answer."""
        connection = http.client.HTTPConnection(streaming.HOST, self.port, timeout=timeout_s)
        try:
            connection.request(method, path)
            answer = connection.getresponse()
            body = answer.read()
        except TimeoutError:
            raise EngineHangs(f"{method} {path}: no answer in {timeout_s:.0f} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise EngineFailure(f"{method} {path}: {error!r}") from error
        finally:
            connection.close()
        if answer.status != http.client.OK:
            raise EngineFailure(f"{method} {path}: HTTP {answer.status}: {body[:200].decode(errors='replace')}")
        found: dict[str, Any] = json.loads(body or b"{}")
        return found

    def timed_call(self, path: str) -> float:
        """Seconds that a POST took."""
        begin = time.perf_counter()
        self.call("POST", path)
        return time.perf_counter() - begin
