"""POST /collective_rpc and /restart_engine."""

from __future__ import annotations

import anyio
import pytest
from http_answers import error

from shuteye.errors import ImageFailure

COMPLETION = {"prompt": "abc", "max_tokens": 2}


def test_collective_rpc_answers_one_result_a_rank(client):
    """vLLM's clients finding another shape."""
    response = client.post("/collective_rpc", json={"method": "residual_bytes", "args": [], "kwargs": {}})
    assert (response.status_code, response.json()) == (200, {"results": [77]})
    assert client.post("/collective_rpc", json={"method": "verify", "args": ["full"]}).status_code == 200


@pytest.mark.parametrize("args", [[], ["/models/other"]])
def test_weights_are_reloaded_by_vllms_call(client, engine, args):
    """vLLM's recipe of level 2, refused at its third step, or a path that is left out."""
    response = client.post("/collective_rpc", json={"method": "reload_weights", "args": args})
    assert response.status_code == 200
    assert [result["updated"] for result in response.json()["results"]] == [3]
    assert engine.reloaded == [args[0] if args else None]
    assert 'transition="reload_weights"' in client.get("/metrics").text


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"method": "reload_weights", "args": [1]}, "args"),
        ({"method": "release"}, "method"),
        ({"method": "__class__"}, "method"),
        ({"method": "verify"}, "args"),
        ({"method": "verify", "args": [["full"]]}, "args"),
        ({"method": "facts", "args": [1]}, "args"),
        ({"method": "facts", "kwargs": {"x": 1}}, "kwargs"),
        ({"method": "facts", "timeout": 5}, "timeout"),
        ({"method": "facts", "other": 5}, "other"),
        ({}, "method"),
    ],
)
def test_nothing_else_can_be_called(client, body, param):
    """A verb behind the sleep controller's back, an argument ignored, an engine ended by a wrong one."""
    response = client.post("/collective_rpc", json=body)
    assert (response.status_code, error(response)["param"]) == (400, param)


def test_a_dead_engine_is_restarted_in_the_same_server(make_engine, client_of):
    """A server that must be restarted, with its port and its clients, because of its engine."""
    engine = make_engine()
    client = client_of(engine)
    assert client.post("/restart_engine").status_code == 409
    client.portal.call(engine.die)
    assert client.post("/v1/completions", json=COMPLETION).status_code == 503
    assert client.get("/health").status_code == 503
    response = client.post("/restart_engine")
    assert (response.status_code, response.json()["status"]) == (200, "ready")
    assert engine.restarts == 1
    assert client.post("/v1/completions", json=COMPLETION).status_code == 200
    assert 'outcome="changed",transition="restart"} 1.0' in client.get("/metrics").text


@pytest.mark.parametrize("sleep_mode", [False, True])
def test_a_hung_engine_is_restarted_with_and_without_sleep_mode(make_engine, client_of, sleep_mode):
    """An engine that hangs for good because nobody may end it but with the server."""
    engine = make_engine(enable_sleep_mode=sleep_mode)
    client = client_of(engine, dev_mode=False, admin_api_key="sk-admin")
    engine.status, engine.hang = "hung", "one step has taken more than 600 seconds"
    assert client.post("/restart_engine").status_code == 401
    response = client.post("/restart_engine", headers={"Authorization": "Bearer sk-admin"})
    assert (response.status_code, response.json()["status"]) == (200, "ready")
    assert engine.restarts == 1


def test_a_restart_that_fails_says_why_and_can_be_tried_again(make_engine, client_of):
    """A failed restart taken for a dead server, or for a success."""
    engine = make_engine()
    client = client_of(engine)
    client.portal.call(engine.die)
    engine.start_error = ImageFailure("the image is damaged")
    response = client.post("/restart_engine")
    assert (response.status_code, error(response)["message"]) == (503, "the image is damaged")
    engine.start_error = None
    assert client.post("/restart_engine").status_code == 200


def test_while_it_loads_requests_are_told_to_come_back(make_engine, client_of):
    """Requests that hang, or fail for good, during a restart."""
    engine = make_engine()
    client = client_of(engine)
    client.portal.call(engine.die)
    engine.start_gate = client.portal.call(_event)
    restarting = client.portal.start_task_soon(_post, client, "/restart_engine")
    while engine.status != "starting":
        client.portal.call(anyio.sleep, 0.002)
    answer = client.post("/v1/completions", json=COMPLETION)
    assert (answer.status_code, error(answer)["type"]) == (503, "EngineNotReadyError")
    assert int(answer.headers["retry-after"]) > 0
    client.portal.call(engine.start_gate.set)
    assert restarting.result(timeout=10) == 200


async def _event():
    import asyncio

    return asyncio.Event()


async def _post(client, path):
    return (await anyio.to_thread.run_sync(client.post, path)).status_code
