"""Requests that are ended from outside, or whose client goes: what callers get, and what the log says."""

import logging
import threading

import pytest
from fake_engine_server import wait_for
from http_answers import error, events
from stalling_clients import Client, request

ENDLESS = {"prompt": "abc", "max_tokens": 400}


def ended_by(client, engine, path, **fields):
    """The answer to a request that runs while `path` is posted."""
    found = []
    asking = threading.Thread(target=lambda: found.append(client.post("/v1/completions", json=ENDLESS | fields)))
    asking.start()
    wait_for(lambda: engine.running, "the request")
    assert client.post(path).status_code == 200
    asking.join(10)
    return found[0]


@pytest.mark.parametrize("path", ["/sleep?level=1&mode=abort", "/pause?mode=abort", "/abort_requests"])
def test_an_aborted_request_is_an_error_where_that_is_chosen(make_engine, client_of, path):
    """Half an answer that a client takes for a whole one, or an error that it does not retry."""
    engine = make_engine(token_delay_s=0.01)
    answer = ended_by(client_of(engine, on_abort="error"), engine, path)
    assert (answer.status_code, error(answer)["type"]) == (503, "RequestAbortedError")
    assert int(answer.headers["Retry-After"]) >= 1


def test_a_stream_that_is_aborted_ends_with_an_error_event(make_engine, client_of):
    """A stream that looks as if it had come to its end."""
    engine = make_engine(token_delay_s=0.01)
    client = client_of(engine, on_abort="error")
    answer = ended_by(client, engine, "/abort_requests", stream=True, n=1)
    chunks = [line for line in answer.text.splitlines() if line.startswith("data: ")]
    assert chunks[-1] == "data: [DONE]"
    assert '"RequestAbortedError"' in chunks[-2]


def test_what_there_is_of_an_aborted_request_is_the_answer_otherwise(make_engine, client_of):
    """vLLM's way, which rollouts rely on, gone."""
    engine = make_engine(token_delay_s=0.01)
    answer = ended_by(client_of(engine), engine, "/abort_requests")
    assert (answer.status_code, answer.json()["choices"][0]["finish_reason"]) == (200, "abort")
    streamed = ended_by(client_of(engine), engine, "/abort_requests", stream=True)
    assert events(streamed)[-1]["choices"][0]["finish_reason"] == "abort"


@pytest.mark.parametrize(("seconds", "expected"), [(None, "1"), (0.2, "1"), (4.2, "5")])
def test_retry_after_is_what_the_last_wake_took(make_engine, client_of, seconds, expected):
    """Clients that come back three times within a second, and give up before the model can be awake."""
    client = client_of(make_engine())
    metrics = client.app.state.contexts.default.metrics
    assert client.post("/sleep").status_code == 200
    if seconds is not None:
        assert client.post("/wake_up").status_code == 200
        metrics._last_wake = (seconds, metrics._last_wake[1])
        assert client.post("/sleep").status_code == 200
    assert client.post("/v1/completions", json=ENDLESS).headers["Retry-After"] == expected


def test_a_request_whose_client_went_is_in_the_access_log(make_engine, live, caplog):
    """Requests that were computed and that no log knows of."""
    engine = make_engine(token_delay_s=0.01)
    server = live(engine)
    with caplog.at_level(logging.INFO, "uvicorn.access"):
        with Client(server.listener.getsockname(), request(ENDLESS)):
            wait_for(lambda: engine.running, "the request")
        wait_for(lambda: not server.server.server_state.tasks, "its end")
    [line] = [record.getMessage() for record in caplog.records if "/v1/completions" in record.getMessage()]
    assert line.endswith('"POST /v1/completions HTTP/1.1" 499')
