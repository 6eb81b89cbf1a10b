"""Hostile values in every field of every route, on a real engine: one request is refused, and no more happens."""

from __future__ import annotations

import functools
import http.client
import itertools
import json
import random
import socket
import threading
import time
from urllib.parse import urlsplit

import pytest
from hostile_requests import RAW, requests_of

from shuteye import AsyncEngine, EngineConfig
from shuteye.tasks.generate import grammar
from shuteye.testing import tiny_encoder, tiny_model, tiny_speech_model

SEED = 20261124
ANSWER_S = 60.0
HEALTH_S = 5.0
"""How long a probe may wait. It is milliseconds by itself; a stall that was worth a fix took 20 seconds."""

WORST = (": deep text", ": surrogate")
"""Values that are tried in every field, for what they once did."""

MODELS = {
    "generate": tiny_model,
    "embed": tiny_encoder,
    "score": functools.partial(tiny_encoder, task="score"),
    "transcribe": tiny_speech_model,
}
ALLOWED = {200, 400, 403, 404, 405, 409, 413, 431, 503}


class Prober(threading.Thread):
    """Asks for /health all the time, and remembers how long the longest answer took."""

    def __init__(self, address):
        super().__init__()
        self.address = address
        self.stopped = threading.Event()
        self.longest_s = 0.0
        self.statuses = set()

    def run(self):
        while not self.stopped.wait(0.02):
            began = time.perf_counter()
            connection = http.client.HTTPConnection(*self.address, timeout=ANSWER_S)
            connection.request("GET", "/health")
            self.statuses.add(connection.getresponse().status)
            connection.close()
            self.longest_s = max(self.longest_s, time.perf_counter() - began)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The tiny checkpoint of a task, made once."""
    return functools.cache(lambda task: MODELS[task](tmp_path_factory.mktemp(task) / "model"))


class Target:
    """A live server of a tiny model in this process, and what it keeps of requests."""

    def __init__(self, engine, server, grammars):
        self.engine, self.server, self.grammars = engine, server, grammars
        self.address = (urlsplit(server.url).hostname, urlsplit(server.url).port)

    def ask(self, method, path, body=b"", content_type=""):
        connection = http.client.HTTPConnection(*self.address, timeout=ANSWER_S)
        headers = {"Content-Type": content_type} if content_type else {}
        try:
            connection.request(method, path, body=body or None, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (BrokenPipeError, ConnectionResetError):  # refused before it was read to its end
            return 413, b'{"error": {}}'
        finally:
            connection.close()

    def send(self, raw):
        """What comes back for bytes sent as they are; nothing if the connection is closed."""
        with socket.create_connection(self.address, timeout=ANSWER_S) as connection:
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
            received = b""
            while chunk := connection.recv(65536):
                received += chunk
        return received

    def left_over(self):
        """Whatever is still known of any request."""
        frontend, stats = self.engine._client, self.engine.stats
        outputs = frontend._outputs
        kept = {name: value for name, value in vars(outputs).items() if isinstance(value, dict) and value}
        if frontend._deliver or frontend._calls:
            kept["frontend"] = (*frontend._deliver, *frontend._calls)
        if stats.num_running or stats.num_waiting:
            kept["scheduler"] = stats
        if any(not each.is_idle for each in self.grammars):
            kept["grammars"] = self.grammars
        if self.server.server.context.audio.seconds:
            kept["audio"] = self.server.server.context.audio
        return kept

    def wait_until_empty(self):
        deadline = time.monotonic() + ANSWER_S
        while left := self.left_over():
            assert time.monotonic() < deadline, f"still there after every request was answered: {left}"
            time.sleep(0.02)


@pytest.fixture
def target(checkpoint, live, tmp_path_factory, monkeypatch):
    """Opens a server of a task's tiny model."""
    made = []

    class Noted(grammar.Grammars):
        def __init__(self, **options):
            super().__init__(**options)
            made.append(self)

    monkeypatch.setattr(grammar, "Grammars", Noted)

    def open_target(task, *, in_process=True):
        memory = {"kv_cache_memory": 1 << 20, "max_model_len": 256} if task == "generate" else {}
        cache_dir = tmp_path_factory.getbasetemp() / "hostile-cache"
        config = EngineConfig(
            str(checkpoint(task)), enable_sleep_mode=True, num_threads=1, cache_dir=cache_dir, **memory
        )
        engine = AsyncEngine(config, in_process=in_process)
        return Target(engine, live(engine, log_level="error"), made)

    return open_target


def assault(target, requests):
    """Send all of them, one after the other; each is answered in order. All that are not are told at the end."""
    wrong = []
    for request in requests:
        status, answer = target.ask(request.method, request.path, request.body, request.content_type)
        said = f"{request.method} {request.path[:60]} with {request.what}: {status} {answer[:300]!r}"
        if status not in ALLOWED or (status >= 400 and request.path != "/ready" and b'"error"' not in answer[:20]):
            wrong.append(said)
        if request.path.startswith(("/sleep", "/pause", "/wake_up")):
            for path in ("/wake_up", "/resume"):
                assert target.ask("POST", path)[0] == 200, f"not to be woken after {said}"
        assert target.engine.status == "ready", f"the engine ended after {said}: {target.engine.failure}"
    assert not wrong, "\n".join(wrong)


def survive(target, requests):
    """`assault`, with a probe all the while, and whatever is raw besides."""
    prober = Prober(target.address)
    prober.start()
    try:
        assault(target, requests)
        for name, raw in RAW.items():
            answer = target.send(raw)
            assert not answer.startswith(b"HTTP/1.1 5"), f"{name}: {answer[:300]!r}"
        target.wait_until_empty()
    finally:
        prober.stopped.set()
        prober.join()
    assert prober.statuses == {200}
    assert prober.longest_s < HEALTH_S


def all_requests(target):
    return list(requests_of(json.loads(target.ask("GET", "/openapi.json")[1])))


@pytest.mark.parametrize(
    "task", ["generate", *(pytest.param(task, marks=pytest.mark.slow) for task in MODELS if task != "generate")]
)
def test_some_values_in_every_field(target, task):
    """A field that ends the engine, stalls everybody, is answered with 500, or leaves something behind."""
    target = target(task)
    chance = random.Random(SEED)
    fields = all_requests(target)
    assert len(fields) > 100
    chosen = []
    for field in fields:
        worst = [each for each in field if each.what.endswith(WORST)] if task == "generate" else []
        chosen += [*worst[:1], chance.choice(field)]
    survive(target, chosen)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("in_process", [True, False])
@pytest.mark.parametrize("task", MODELS)
def test_every_value_in_every_field(target, task, in_process):
    """As above; and what only the way to the engine's own process cannot carry."""
    target = target(task, in_process=in_process)
    survive(target, itertools.chain.from_iterable(all_requests(target)))
