"""X-Request-Id: in, out, in logs, in answers."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest

from shuteye.logs import REQUEST_ID

COMPLETION = {"prompt": "abc", "max_tokens": 3}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/completions", 200),
        ("GET", "/nowhere", 404),
        ("GET", "/v1/completions", 405),
        ("GET", "/health", 200),
    ],
)
def test_the_callers_id_comes_back_with_every_status(client, method, path, status):
    """An answer that cannot be matched with the caller's log; least of all an error."""
    response = client.request(method, path, json=COMPLETION, headers={"X-Request-Id": "caller-7"})
    assert (response.status_code, response.headers.get_list("x-request-id")) == (status, ["caller-7"])


def test_errors_of_keys_sleep_and_bugs_carry_it(make_engine, client_of):
    """Errors answered outside of the routes, without the id."""
    engine = make_engine(breakage=ZeroDivisionError("bug"))
    client = client_of(engine, api_key="sk", admin_api_key="admin")
    headers = {"X-Request-Id": "caller-8"}
    assert client.post("/v1/completions", json=COMPLETION, headers=headers).headers["x-request-id"] == "caller-8"
    keyed = headers | {"Authorization": "Bearer admin"}
    bug = client.post("/v1/completions", json=COMPLETION, headers=keyed)
    assert (bug.status_code, bug.headers["x-request-id"]) == (500, "caller-8")
    client.post("/sleep", headers=keyed)
    asleep = client.post("/v1/completions", json=COMPLETION | {"stream": True}, headers=keyed)
    assert (asleep.status_code, asleep.headers["x-request-id"]) == (503, "caller-8")


@pytest.mark.parametrize("bad", ["", "two words", "x" * 129, "line\x7f", "é"])
def test_ids_that_would_harm_logs_are_replaced(client, bad):
    """Forged log lines; ids too long to keep."""
    response = client.get("/health", headers={"X-Request-Id": bad.encode()})
    assert response.headers["x-request-id"] not in {bad, ""}
    assert len(response.headers["x-request-id"]) == 32


def test_without_one_every_request_gets_its_own(client):
    """Two requests under one id."""
    assert len({client.get("/health").headers["x-request-id"] for _ in range(3)}) == 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "prefix"), [("/v1/completions", "cmpl"), ("/v1/chat/completions", "chatcmpl")])
def test_the_answers_own_id_is_made_of_it(client, path, prefix, stream):
    """An answer in somebody's database that cannot be found in the server's log (vLLM does the same)."""
    ask = {"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {"prompt": "abc"}
    response = client.post(path, json=ask | {"max_tokens": 2, "stream": stream}, headers={"X-Request-Id": "caller-9"})
    assert f'"id":"{prefix}-caller-9"' in response.text.replace('": ', '":')


def test_two_requests_under_one_id_both_run(client):
    """A caller that uses one id for a whole session, and is refused."""

    def ask(_index):
        body = COMPLETION | {"max_tokens": 200}
        return client.post("/v1/completions", json=body, headers={"X-Request-Id": "same"}).status_code

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(8))) == [200] * 8


def test_log_lines_know_their_request(make_engine, client_of, caplog):
    """Lines of one request that cannot be found by its id, or a prompt that leaks into the log."""
    client = client_of(make_engine(), log_requests=True)
    seen = []

    class Recorder(logging.Handler):
        def emit(self, record):
            seen.append((REQUEST_ID.get(), record.getMessage(), record.__dict__.get("num_output_tokens")))

    logger = logging.getLogger("shuteye.requests")
    handler = Recorder()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        body = {"prompt": "a secret", "max_tokens": 3, "n": 2}
        client.post("/v1/completions", json=body, headers={"X-Request-Id": "caller-10"})
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    assert len(seen) == 1
    request_id, message, num_output_tokens = seen[0]
    assert (request_id, num_output_tokens) == ("caller-10", 6)
    assert message.startswith("length length: 8 tokens in (1 cached), 6 out, ")
    assert "secret" not in message
