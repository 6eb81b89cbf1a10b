"""What operators ask of a server itself: to end requests, to tell its configuration, to stop."""

import json
import threading

import httpx2
import pytest
from fake_engine_server import wait_for
from http_answers import error

from shuteye.cli import main as cli
from shuteye.client import Client

ENDLESS = {"prompt": "abc", "max_tokens": 400}


def in_background(client, engine, count, **headers):
    """So many completions that run; what came of each is in the dict, by its number."""
    found = {}

    def ask(number):
        own = {"X-Request-Id": f"request-{number}"} | headers
        found[number] = client.post("/v1/completions", json=ENDLESS, headers=own).json()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(engine.running) == count, "the requests")
    return found, threads


@pytest.fixture
def slow(make_engine, client_of):
    engine = make_engine(token_delay_s=0.02)
    return client_of(engine), engine


@pytest.mark.parametrize("name", ["request-1", "cmpl-request-1"])
def test_requests_are_ended_by_the_id_that_callers_know(slow, name):
    """An id that only the engine knows, or everybody's request ended for one."""
    client, engine = slow
    found, threads = in_background(client, engine, 2)
    answer = client.post("/abort_requests", json={"request_ids": [name, "cmpl-request", "unknown"]})
    assert (answer.status_code, answer.json()) == (200, {"status": "aborted", "aborted": 1})
    threads[1].join(10)
    assert found[1]["choices"][0]["finish_reason"] == "abort"
    assert 0 not in found
    client.post("/abort_requests")
    threads[0].join(10)


@pytest.mark.parametrize("body", [None, {}, {"request_ids": []}, {"request_ids": None}])
def test_all_requests_are_ended_where_none_is_named_and_new_ones_run(slow, body):
    """A pause that somebody must undo, or requests that go on."""
    client, engine = slow
    found, threads = in_background(client, engine, 2)
    answer = client.post("/abort_requests", json=body)
    assert answer.json() == {"status": "aborted", "aborted": 2}
    for thread in threads:
        thread.join(10)
    assert {one["choices"][0]["finish_reason"] for one in found.values()} == {"abort"}
    assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("body", [{"request_ids": "a"}, {"request_ids": [1]}, {"other": 1}])
def test_a_body_of_another_shape_ends_nothing(client, body):
    """Every request ended because of a typing error."""
    assert error(client.post("/abort_requests", json=body))["code"] == 400


def test_the_configuration_is_told_without_its_keys(make_engine, client_of):
    """Keys in a bug report; a shape that vLLM's callers cannot read."""
    client = client_of(make_engine(seed=7), api_key="inference-secret", admin_api_key="admin-secret", wait=False)
    told = client.get("/server_info?config_format=json", headers={"Authorization": "Bearer admin-secret"})
    assert "secret" not in told.text
    body = told.json()
    assert body.keys() == {"vllm_config", "vllm_env", "system_env"}
    assert (body["vllm_config"]["engine"]["seed"], body["vllm_config"]["server"]["api_key"]) == (7, "***")
    text = client.get("/server_info", headers={"Authorization": "Bearer admin-secret"})
    assert "seed=7" in text.json()["vllm_config"]
    assert "secret" not in text.text
    assert (
        client.get("/server_info?config_format=xml", headers={"Authorization": "Bearer admin-secret"}).status_code
        == 400
    )
    assert client.get("/server_info", headers={"Authorization": "Bearer inference-secret"}).status_code == 403


def test_a_stop_lets_what_runs_finish_and_takes_nothing_new(make_engine, live, capsys):
    """Answers cut off by `shuteye stop`, or a command that says it is done while the server still runs."""
    engine = make_engine(token_delay_s=0.01, enable_sleep_mode=False)
    server = live(engine, shutdown_grace_s=20)
    got = {}

    def ask():
        got["answer"] = httpx2.post(
            f"{server.url}/v1/completions", json={"prompt": "abc", "max_tokens": 40}, timeout=30
        )

    asking = threading.Thread(target=ask)
    asking.start()
    wait_for(lambda: engine.running, "the request")
    assert cli.run(["stop", "--url", server.url]) == 0
    assert "Stopped in" in capsys.readouterr().out
    assert not server.thread.is_alive() or server.listener.fileno() == -1
    asking.join(10)
    assert len(json.loads(got["answer"].content)["choices"][0]["text"]) == 40
    with pytest.raises(httpx2.TransportError):
        httpx2.get(f"{server.url}/ping")


def test_a_stop_that_takes_too_long_is_told(make_engine, live, capsys):
    """A command that waits for ever for a request that runs."""
    engine = make_engine(token_delay_s=0.05)
    server = live(engine, shutdown_grace_s=3)
    asking = threading.Thread(target=lambda: httpx2.post(f"{server.url}/v1/completions", json=ENDLESS, timeout=30))
    asking.start()
    wait_for(lambda: engine.running, "the request")
    assert cli.run(["stop", "--url", server.url, "--timeout-s", "1"]) == 1
    assert "still stopping" in capsys.readouterr().err
    with Client(server.url) as client:
        assert client.is_stopping()
        assert client.shutdown() == 3
    assert error(httpx2.post(f"{server.url}/v1/completions", json=ENDLESS))["code"] == 503
    asking.join(20)


def test_a_server_that_others_run_says_who_can_stop_it(client):
    """An answer that says `stopping` where nothing will."""
    assert error(client.post("/shutdown"))["code"] == 409
    assert client.get("/ready").status_code == 200
