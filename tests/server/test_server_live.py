"""A real server on a port: the openai client, clients that go away, signals and failures to start."""

from __future__ import annotations

import json
import signal
import socket
import time

import httpx2
import openai
import pytest
from fake_engine_server import streaming, wait_for

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
def client_for():
    clients = []

    def make(server, **options):
        client = openai.OpenAI(base_url=f"{server.url}/v1", **({"api_key": "none", "max_retries": 0} | options))
        clients.append(client)
        return client

    yield make
    for client in clients:
        client.close()


def test_openai_client(make_engine, live, client_for):
    """Whatever the client's own parsing does not accept."""
    client = client_for(live(make_engine()))
    assert [model.id for model in client.models.list()] == ["tiny"]
    chat = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=30, logprobs=True, top_logprobs=1)
    with client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=30, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == chat.choices[0].message.content
    assert chunks[-1].usage == chat.usage
    assert len(chat.choices[0].logprobs.content) == 30
    whole = client.completions.create(model="tiny", prompt=["abc", "de"], max_tokens=5, logprobs=1)
    assert [choice.text for choice in whole.choices] == ["abcab", "deded"]
    with client.completions.create(model="tiny", prompt="abc", max_tokens=5, stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == "abcab"


def test_openai_clients_errors(make_engine, live, client_for):
    """Errors that the client cannot tell apart."""
    server = live(make_engine(), api_key="sk")
    client = client_for(server, api_key="sk")
    with pytest.raises(openai.NotFoundError, match="'tiny'"):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="tiny", prompt="x", temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.AuthenticationError):
        client_for(server, api_key="wrong").models.list()
    httpx2.post(f"{server.url}/sleep").raise_for_status()
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError) as asleep:
            client.completions.create(model="tiny", prompt="x", stream=stream)
        assert (asleep.value.status_code, asleep.value.type) == (503, "ModelSleepingError")


def test_openai_client_raises_errors_within_a_stream(make_engine, live, client_for):
    """Half an answer taken for a whole one."""
    from shuteye.errors import EngineDead

    client = client_for(live(make_engine(breakage=EngineDead("gone"))))
    stream = client.completions.create(model="tiny", prompt="abc", stream=True, max_tokens=9)
    with stream, pytest.raises(openai.APIError, match="gone"):
        list(stream)


# --- clients that go away -----------------------------------------------------------------------


def test_leaving_a_stream_aborts_it(make_engine, live):
    """A model that goes on generating for nobody."""
    engine = make_engine(token_delay_s=0.005, max_model_len=100_000)
    server = live(engine)
    ask = {"prompt": ["abc", "de"], "stream": True, "max_tokens": 50_000}
    with httpx2.stream("POST", f"{server.url}/v1/completions", json=ask) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        assert len(engine.running) == 2
    wait_for(lambda: not engine.running, "the abort of a stream")
    assert len(engine.aborted) == 2
    metrics = httpx2.get(f"{server.url}/metrics").text
    assert 'shuteye_request_failure_total{model_name="tiny",reason="disconnected"}' in metrics


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("why", ["slow", "held", "paused"])
def test_leaving_before_the_answer_begins_aborts_it(make_engine, live, why, stream):
    """Requests that wait for ever, holding their place, after their client has gone."""
    engine = make_engine(token_delay_s=0.2 if why == "slow" else 0.0, on_sleeping_request="hold", max_model_len=100_000)
    server = live(engine)
    if why != "slow":
        httpx2.post(f"{server.url}/{'sleep' if why == 'held' else 'pause?mode=keep'}").raise_for_status()
    ask = {"prompt": "abc", "stream": stream, "max_tokens": 50_000}
    with socket.create_connection(server.listener.getsockname()) as connection:
        body = httpx2.Request("POST", server.url, json=ask)
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body.content)}\r\n\r\n".encode() + body.content)
        wait_for(lambda: engine.running, "the start of the request")
    wait_for(lambda: not engine.running, "the abort of the request")
    assert len(engine.aborted) == 1


def test_requests_and_streams_go_on_through_a_sleep_that_keeps_them(make_engine, live):
    """Streams cut by `mode=keep`; text lost over it."""
    engine = make_engine(token_delay_s=0.002)
    server = live(engine)
    ask = {"prompt": "abc", "stream": True, "max_tokens": 60}
    with httpx2.stream("POST", f"{server.url}/v1/completions", json=ask) as response:
        lines = response.iter_lines()
        got = [next(lines)]
        assert httpx2.post(f"{server.url}/sleep?mode=keep").json()["changed"] is True
        assert httpx2.get(f"{server.url}/v1/models").status_code == 200
        assert httpx2.post(f"{server.url}/wake_up").json()["changed"] is True
        got += list(lines)
    assert sum('"text":"' in line for line in got) == 60
    assert got[-2] == "data: [DONE]"


def test_abort_mode_finishes_streams_with_abort(make_engine, live):
    """A stream that hangs, or ends without a reason, when the model falls asleep under it."""
    engine = make_engine(token_delay_s=0.005, max_model_len=100_000)
    server = live(engine)
    ask = {"messages": MESSAGES, "stream": True, "max_tokens": 50_000}
    with httpx2.stream("POST", f"{server.url}/v1/chat/completions", json=ask) as response:
        lines = response.iter_lines()
        got = [next(lines)]
        httpx2.post(f"{server.url}/sleep?mode=abort").raise_for_status()
        got += [line for line in lines if line]
    assert '"finish_reason":"abort"' in got[-2]
    assert got[-1] == "data: [DONE]"


# --- signals and failures to start --------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_drains_and_exits_with_0(serve, number):
    """Answers cut by a restart; an engine left behind; a process manager told of a crash."""
    server = serve("{'token_delay_s': 0.01}")
    url = server.url_when_ready()
    results: list = []
    thread = streaming(url, results, max_tokens=60)
    wait_for(lambda: "num_requests_running" in httpx2.get(f"{url}/metrics").text, "a scrape")
    time.sleep(0.2)
    server.process.send_signal(number)
    assert server.end() == 0, server.log
    thread.join()
    assert sum('"text"' in str(line) for line in results) == 60
    assert results[-2:] == ["data: [DONE]", ""]
    assert server.log.rstrip().endswith("closed")
    assert "Traceback" not in server.log


def test_while_it_drains_it_says_so_and_takes_nothing_new(serve):
    """Probes and clients that find nobody, work that is taken and then cut, a stop that waits longer than it must."""
    server = serve("{'token_delay_s': 0.01}", grace=60)
    url = server.url_when_ready()
    results: list = []
    thread = streaming(url, results, max_tokens=150)
    wait_for(lambda: results, "the first token")
    with httpx2.Client(base_url=url) as kept_alive:
        assert kept_alive.get("/ready").status_code == 200
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: "SIGTERM" in server.log, "the signal")
        for client in (kept_alive, httpx2):
            where = "" if client is kept_alive else url
            assert client.get(f"{where}/ready").json() == {"ready": False, "reason": "stopping"}
            assert client.get(f"{where}/health").status_code == 200
            for stream in (False, True):
                refused = client.post(f"{where}/v1/completions", json={"prompt": "abc", "stream": stream})
                assert (refused.status_code, refused.json()["error"]["type"]) == (503, "ServerStoppingError")
                assert int(refused.headers["retry-after"]) > 0
    assert server.end() == 0, server.log
    thread.join()
    assert sum('"text"' in str(line) for line in results) == 150
    assert "Traceback" not in server.log


def test_json_logs(serve):
    """One line that is no JSON object, and a collector that gives up; the engine's and uvicorn's lines among them."""
    server = serve("{}", log_format="json")
    url = server.url_when_ready()
    ask = {"prompt": "a secret", "max_tokens": 2}
    httpx2.post(f"{url}/v1/completions", json=ask, headers={"X-Request-Id": "caller-1"}).raise_for_status()
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0
    *lines, last = server.log.splitlines()
    assert last == "closed"
    found = [json.loads(line) for line in lines]
    access = [one for one in found if one["logger"] == "uvicorn.access" and "/v1/completions" in one["message"]]
    assert [one["request_id"] for one in access] == ["caller-1"]
    assert "secret" not in server.log


def test_the_grace_period_ends(serve):
    """A stop that never comes because of one long answer."""
    server = serve("{'token_delay_s': 0.01}", grace=1)
    results: list = []
    thread = streaming(server.url_when_ready(), results, max_tokens=90_000)
    time.sleep(0.3)
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0, server.log
    assert 0.5 < time.monotonic() - began < 8
    thread.join()
    assert "ServerStoppingError" in "".join(map(str, results)), "who was cut is told that the engine died"
    assert server.log.rstrip().endswith("closed")


def test_a_second_signal_does_not_wait(serve):
    """A Ctrl-C that seems to do nothing."""
    server = serve("{'token_delay_s': 0.01}", grace=60)
    results: list = []
    thread = streaming(server.url_when_ready(), results, max_tokens=90_000)
    time.sleep(0.3)
    server.process.send_signal(signal.SIGINT)
    wait_for(lambda: "SIGINT" in server.log, "the first signal")
    server.process.send_signal(signal.SIGINT)
    assert server.end() == 130, server.log
    thread.join()
    assert server.log.rstrip().endswith("closed")


def test_it_listens_while_loading_and_can_be_stopped_then(serve):
    """Connection refused for minutes; a Ctrl-C that waits for the load."""
    server = serve("{'start_gate': asyncio.Event()}")
    url = server.url()
    wait_for(lambda: httpx2.get(f"{url}/ready").json() == {"ready": False, "reason": "loading"}, "loading")
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0, server.log
    assert "failed to load" not in server.log


@pytest.mark.parametrize("error", ["ImageFailure('the image is damaged')", "ZeroDivisionError('the image is damaged')"])
def test_a_model_that_cannot_load_ends_the_server(serve, error):
    """A server that listens for ever without a model, or exits with 0."""
    server = serve(f"{{'start_error': {error}}}")
    assert server.end() == 1, server.log
    assert "'tiny' failed to load" in server.log
    assert "the image is damaged" in server.log
    assert ("Traceback" in server.log) is error.startswith("Zero")
    if error.startswith("Image"):
        *_, cause, closed = server.log.rstrip().splitlines()
        assert "the image is damaged" in cause, "the last line is about something else"
        assert closed == "closed"


def test_a_setting_that_keeps_a_model_from_loading_is_named_as_a_flag(serve):
    """An error about a field that no flag is called."""
    server = serve("{'start_error': InvalidRequest('not supported.', param='memory_backend')}")
    assert server.end() == 1
    *_, cause, _closed = server.log.rstrip().splitlines()
    assert cause.endswith("'tiny' failed to load: --memory-backend: not supported.")


def test_a_port_in_use_is_said_clearly(serve):
    """A traceback instead of what to do."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = serve(port=port)
        assert server.end() == 1
    assert f"--port: Cannot listen on 127.0.0.1:{port}: Address already in use" in server.log
    assert "Traceback" not in server.log


# --- our own client -----------------------------------------------------------------------------


def test_shuteyes_client_understands_every_answer(make_engine, live):
    """Client and server drifting apart: a state read as its defaults, a report that cannot be parsed."""
    from shuteye.client import Client

    engine = make_engine()
    server = live(engine, dev_mode=False, admin_api_key="sk-admin", api_key="sk")
    with Client(server.url, admin_api_key="sk-admin") as client:
        assert client.health()
        assert client.ready()
        assert client.state().state == engine.state
        assert client.sleep(level=1).freed_bytes == 1500
        assert client.is_sleeping()
        assert client.state().state == engine.state
        assert not client.ready()
        assert client.wake_up().restored_bytes == 1500


def test_a_sleeping_model_is_woken_once_by_the_waking_transport(make_engine, live, client_for):
    """The openai client failing across a sleep; several wakes for several requests."""
    from shuteye.client import WakingTransport

    engine = make_engine()
    server = live(engine)
    with httpx2.Client(transport=WakingTransport()) as http:
        client = client_for(server, http_client=http)
        for stream in (False, True):
            httpx2.post(f"{server.url}/sleep").raise_for_status()
            answer = client.completions.create(model="tiny", prompt="abc", max_tokens=4, stream=stream)
            text = "".join(chunk.choices[0].text for chunk in answer) if stream else answer.choices[0].text
            assert text == "abca"
            assert not engine.is_sleeping
