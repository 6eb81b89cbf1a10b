"""Spans: what they say, whom they belong to, and that nothing is imported without them."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from starlette.testclient import TestClient

from shuteye.errors import EngineDead
from shuteye.server.app import create_app
from shuteye.server.config import ServerConfig
from shuteye.server.telemetry.timing import RequestTiming
from shuteye.server.telemetry.tracing import Tracer

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
COMPLETION = {"prompt": "abc", "max_tokens": 4}


@pytest.fixture
def exporter():
    return InMemorySpanExporter()


@pytest.fixture
def traced(make_engine, exporter):
    """Opens a client on an app whose spans are in `exporter`."""
    clients = []

    def open_client(**options):
        tracer = Tracer(exporter, "tiny", batched=False)
        app = create_app(make_engine(**options), ServerConfig(dev_mode=True), tracer=tracer)
        client = TestClient(app, "http://localhost", raise_server_exceptions=False)
        client.__enter__()
        clients.append(client)
        while client.get("/ready").status_code != 200:
            time.sleep(0.002)
        return client

    yield open_client
    for client in clients:
        client.__exit__(None, None, None)


def spans_of(exporter, **wanted):
    return {span.name: span for span in exporter.get_finished_spans()}


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_tree_under_the_callers_span(traced, exporter, stream):
    """Spans in pieces: a caller's trace that ends at our door, phases that belong to nothing."""
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "caller-1"}
    assert traced().post("/v1/completions", json=COMPLETION | {"stream": stream}, headers=headers).status_code == 200
    spans = spans_of(exporter)
    assert set(spans) == {"POST /v1/completions", "generate", "queue", "prefill", "decode"}
    root, generate = spans["POST /v1/completions"], spans["generate"]
    assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {TRACE}
    assert f"{root.parent.span_id:016x}" == PARENT
    assert generate.parent.span_id == root.context.span_id
    assert {spans[name].parent.span_id for name in ("queue", "prefill", "decode")} == {generate.context.span_id}
    assert (root.attributes["http.response.status_code"], root.attributes["http.route"]) == (200, "/v1/completions")
    assert generate.attributes["gen_ai.usage.input_tokens"] == 3
    assert generate.attributes["gen_ai.usage.output_tokens"] == 4
    assert generate.attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert generate.attributes["gen_ai.response.id"] == "caller-1"
    assert "abc" not in str([dict(span.attributes) for span in spans.values()]), "the prompt is in a span"


def test_phases_follow_one_another(traced, exporter):
    """Times of another clock; gaps and overlaps that make a flame graph useless."""
    before = time.time_ns()
    traced(token_delay_s=0.005).post("/v1/completions", json=COMPLETION)
    spans = spans_of(exporter)
    queue, prefill, decode, whole = (spans[name] for name in ("queue", "prefill", "decode", "generate"))
    assert before <= whole.start_time == queue.start_time
    assert queue.end_time == prefill.start_time
    assert prefill.end_time == decode.start_time
    assert queue.start_time <= queue.end_time <= prefill.end_time <= decode.end_time
    assert decode.end_time == whole.end_time <= time.time_ns()
    assert decode.end_time - decode.start_time >= 14_000_000


def test_without_a_caller_every_request_is_a_trace_of_its_own(traced, exporter):
    """Requests of strangers in one trace, as when a context is left behind."""
    client = traced()
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: client.post("/v1/completions", json=COMPLETION), range(6)))
    spans = exporter.get_finished_spans()
    assert len({span.context.trace_id for span in spans}) == 6
    assert len(spans) == 30


def test_sleeps_and_wakes(traced, exporter):
    """A slow first answer whose cause, the wake, is in no trace."""
    client = traced(on_sleeping_request="wake")
    client.post("/sleep")
    client.post("/sleep?level=9")
    client.post("/v1/completions", json=COMPLETION)
    found = [span for span in exporter.get_finished_spans() if span.name in {"sleep", "wake_up"}]
    assert [(span.name, span.attributes["shuteye.outcome"]) for span in found] == [
        ("sleep", "changed"),
        ("sleep", "InvalidRequest"),
        ("wake_up", "changed"),
    ]
    assert found[0].attributes["shuteye.freed_bytes"] == 1500
    assert found[0].parent is not None
    assert found[1].status.status_code is StatusCode.ERROR
    assert found[2].attributes["shuteye.cause"] == "request"
    assert found[2].end_time - found[2].start_time == pytest.approx(20_000_000, rel=0.01)


def test_failures(traced, exporter):
    """A failed request that looks like a served one."""
    client = traced(breakage=EngineDead("gone"))
    client.post("/v1/completions", json=COMPLETION)
    spans = spans_of(exporter)
    assert spans["POST /v1/completions"].attributes["http.response.status_code"] == 503
    assert spans["generate"].attributes["gen_ai.response.finish_reasons"] == ("error",)


def test_probes_make_no_spans(traced, exporter):
    """Traces drowned by what is asked every second."""
    client = traced()
    for path in ("/health", "/ready", "/metrics", "/ping", "/version"):
        client.get(path)
    assert exporter.get_finished_spans() == ()


@pytest.mark.parametrize(
    ("scheduled", "first_token", "outcome", "phases"),
    [
        (None, None, "error", {"queue": (0.0, 9.0)}),
        (None, None, "stop", {}),  # an embedding
        (1.0, None, "error", {"queue": (0.0, 1.0), "prefill": (1.0, 9.0)}),
        (1.0, 3.0, "stop", {"queue": (0.0, 1.0), "prefill": (1.0, 3.0), "decode": (3.0, 9.0)}),
        (None, 3.0, "stop", {}),
    ],
)
def test_phases_as_far_as_a_prompt_came(scheduled, first_token, outcome, phases):
    """A phase with the times of another, or an embedding that was in the queue all the time."""
    served = RequestTiming("id", 0.0, 9.0, scheduled, first_token, 1, 1, 0, (outcome,))
    assert served.phases == phases


def test_nothing_of_it_is_imported_without_an_endpoint():
    """Start-up time and memory of everybody, for a feature of few."""
    code = (
        "import sys; from shuteye.server.app import create_app; from shuteye.server.config import ServerConfig\n"
        "from shuteye.frontend.async_engine import AsyncEngine; from shuteye.config import EngineConfig\n"
        "create_app(AsyncEngine(EngineConfig()), ServerConfig())\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry.sdk')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_extra_is_said_clearly(make_engine, monkeypatch):
    """A traceback, or spans that silently go nowhere."""
    from shuteye.errors import InvalidRequest

    monkeypatch.setitem(sys.modules, "shuteye.server.telemetry.tracing", None)
    with pytest.raises(InvalidRequest, match=r"shuteye\[otel\]"):
        create_app(make_engine(), ServerConfig(otlp_traces_endpoint="http://127.0.0.1:4318/v1/traces"))


def test_spans_reach_a_collector(make_engine):
    """Spans that are made, and never sent; those of the last moments lost when the server stops."""
    bodies = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, args=(0.01,)).start()
        endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
        app = create_app(make_engine(), ServerConfig(otlp_traces_endpoint=endpoint))
        with TestClient(app, "http://localhost") as client:
            while client.get("/ready").status_code != 200:
                time.sleep(0.002)
            client.post("/v1/completions", json=COMPLETION)
        collector.shutdown()
    assert {path for path, _body in bodies} == {"/v1/traces"}
    assert all(name in bodies[0][1] for name in (b"generate", b"queue", b"prefill", b"decode"))
