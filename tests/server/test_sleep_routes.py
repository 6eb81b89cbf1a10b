"""The control routes, and every other route while the model sleeps, is paused, loads or is dead."""

from __future__ import annotations

import asyncio
import json

import pytest
from http_answers import error

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
COMPLETION = {"prompt": "abc", "max_tokens": 2}
PROTECTED = [
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", CHAT | {"stream": True}),
    ("/v1/completions", COMPLETION),
    ("/v1/completions", COMPLETION | {"stream": True}),
    ("/v1/completions", COMPLETION | {"prompt": ["a", "b"], "stream": True}),
    ("/v1/embeddings", {"input": "x"}),
    ("/pooling", {"input": "x"}),
    ("/score", {}),
    ("/v1/score", {}),
    ("/rerank", {}),
    ("/v1/rerank", {}),
    ("/v2/rerank", {}),
    ("/v1/audio/transcriptions", {}),
]
UNPROTECTED = [
    ("POST", "/tokenize", {"prompt": "abc"}),
    ("POST", "/detokenize", {"tokens": [64, 65]}),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/tiny", None),
    ("GET", "/health", None),
    ("GET", "/ping", None),
    ("POST", "/ping", None),
    ("GET", "/version", None),
]
SLEEPING = (
    b'{"error": {"message": "Model is currently in sleep mode. Please wake it up first with a POST request to '
    b'/wake_up", "type": "ModelSleepingError", "code": 503}}'
)


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize(("path", "body"), PROTECTED)
def test_asleep_every_protected_route_answers_the_503_to_the_letter(client, engine, path, body, level):
    """Another key, another message, or a stream that begins before the refusal."""
    assert client.post(f"/sleep?level={level}").status_code == 200
    response = client.post(path, json=body)
    assert response.status_code == 503
    assert response.content == SLEEPING
    assert int(response.headers["retry-after"]) >= 1
    assert response.headers["content-type"] == "application/json"
    assert engine.seen == []


@pytest.mark.parametrize("tag", ["weights", "kv_cache"])
@pytest.mark.parametrize(("path", "body"), PROTECTED[:4])
def test_partly_asleep_is_asleep(client, path, body, tag):
    """A request served with one tag away."""
    client.post(f"/sleep?tags={tag}")
    assert client.post(path, json=body).content == SLEEPING


@pytest.mark.parametrize(("path", "body"), PROTECTED[:4])
def test_a_sleep_between_the_check_and_the_engine_is_refused_alike(client, engine, path, body, monkeypatch):
    """The engine's own refusal, racing the early one, must be the same bytes and come before any stream."""
    import shuteye.server.http.admission

    client.post("/sleep")
    monkeypatch.setattr(shuteye.server.http.admission, "refuse_unless_serving", lambda _engine: None)
    response = client.post(path, json=body)
    assert (response.status_code, response.content) == (503, SLEEPING)
    assert len(engine.seen) == 1


@pytest.mark.parametrize("how", ["/sleep?level=1", "/sleep?level=2", "/pause"])
@pytest.mark.parametrize(("method", "path", "body"), UNPROTECTED)
def test_unprotected_routes_answer_the_same_while_asleep_or_paused(client, method, path, body, how):
    """A route that needs no weights refused while asleep or paused."""
    awake = client.request(method, path, json=body)
    assert awake.status_code == 200
    assert client.post(how).status_code == 200
    asleep = client.request(method, path, json=body)
    assert (asleep.status_code, asleep.content) == (200, awake.content)


@pytest.mark.parametrize(("path", "task"), [("/v1/embeddings", "embed"), ("/v2/rerank", "score")])
def test_routes_of_other_tasks_name_the_task(client, path, task):
    """A 404 that leaves the caller guessing."""
    found = error(client.post(path, json={}))
    assert found["code"] == 400
    assert f"'{task}'" in found["message"]
    assert "'generate'" in found["message"]


def test_generation_routes_refuse_a_model_for_another_task(make_engine, client_of):
    """A text answer from an embedding model."""
    client = client_of(make_engine(task="embed"))
    assert "'embed'" in error(client.post("/v1/completions", json=COMPLETION))["message"]


def test_ready_says_why_not(client, engine):
    """A load balancer sending requests to a sleeping model."""
    assert (client.get("/ready").status_code, client.get("/ready").json()) == (200, {"ready": True})
    client.post("/sleep")
    response = client.get("/ready")
    assert (response.status_code, response.json()) == (503, {"ready": False, "reason": "sleeping"})
    client.post("/wake_up")
    client.post("/pause")
    assert client.get("/ready").json() == {"ready": False, "reason": "paused"}
    client.post("/resume")
    assert client.get("/ready").status_code == 200
    client.portal.call(engine.die)
    assert client.get("/ready").json() == {"ready": False, "reason": "dead"}


def test_loading_is_alive_but_neither_healthy_nor_ready(make_engine, client_of):
    """Requests sent as soon as /health says 200, and refused; a process that loads for minutes taken for dead."""
    engine = make_engine(start_gate=asyncio.Event())
    client = client_of(engine, wait=False)
    health = client.get("/health")
    assert (health.status_code, health.json()) == (503, {"status": "loading"})
    assert int(health.headers["retry-after"]) > 0
    assert (client.get("/ping").status_code, client.post("/ping").status_code) == (200, 200)
    assert client.get("/ready").json() == {"ready": False, "reason": "loading"}
    assert client.get("/v1/models").json()["data"][0]["max_model_len"] is None
    assert client.get("/state").json()["model"] is None
    assert client.get("/metrics").status_code == 200
    response = client.post("/v1/completions", json=COMPLETION)
    assert error(response)["type"] == "EngineNotReadyError"
    assert (response.status_code, "retry-after" in response.headers) == (503, True)
    assert error(client.post("/tokenize", json={"prompt": "a"}))["type"] == "EngineNotReadyError"
    client.portal.call(engine.start_gate.set)
    while client.get("/ready").status_code != 200:
        pass
    assert (client.get("/health").status_code, client.get("/health").json()) == (200, {"status": "ok"})


def unhealthy(client):
    """The status and the error of a 503 of /health; a process that answers is alive all the same."""
    response = client.get("/health")
    assert response.status_code == 503
    assert response.json().keys() == {"status", "error"}
    assert client.get("/ping").status_code == 200
    return response.json()["status"], response.json()["error"]


@pytest.mark.parametrize(("path", "body"), PROTECTED[:4])
def test_a_hung_engine_is_told_and_refuses_until_it_goes_on(client, engine, path, body):
    """Requests that queue for ever behind a process that is stopped; a probe that finds it healthy."""
    engine.status, engine.hang = "hung", "its process has given no sign of life for 10 seconds"
    response = client.post(path, json=body)
    found = error(response)
    assert (found["code"], found["type"], "retry-after" in response.headers) == (503, "EngineHungError", True)
    assert "no sign of life" in found["message"]
    assert unhealthy(client) == ("hung", found)
    assert client.get("/ready").json() == {"ready": False, "reason": "hung"}
    state = client.get("/state").json()
    assert (state["status"], state["failure"]) == ("hung", engine.hang)
    engine.status, engine.hang = "ready", None
    assert client.get("/health").status_code == 200
    assert client.get("/ready").status_code == 200


@pytest.mark.parametrize(("path", "body"), PROTECTED[:4])
def test_a_dead_engine_is_told_from_a_sleeping_one(client, engine, path, body):
    """Clients that wake and retry for ever against a dead engine."""
    client.portal.call(engine.die)
    found = error(client.post(path, json=body))
    assert (found["code"], found["type"]) == (503, "EngineDeadError")
    assert "signal 9" in found["message"]
    status, told = unhealthy(client)
    assert (status, told["type"]) == ("dead", "EngineDeadError")


def test_faulted_is_told_by_health_and_requests(client, engine):
    """A faulted engine that looks healthy."""
    from dataclasses import replace

    engine.state = replace(engine.state, faulted="munmap failed", gate="closed")
    assert error(client.post("/v1/completions", json=COMPLETION))["type"] == "EngineFaultedError"
    status, told = unhealthy(client)
    assert (status, "munmap failed" in told["message"]) == ("faulted", True)
    assert client.get("/ready").json()["reason"] == "faulted"


def test_failed_loading_is_told_with_its_reason(make_engine, client_of):
    """`failed` without the reason; or a client's 400 for an operator's mistake."""
    from shuteye.errors import UnsupportedModel

    client = client_of(make_engine(start_error=UnsupportedModel("no such architecture")), wait=False)
    while client.get("/ready").json()["reason"] == "loading":
        pass
    assert client.get("/ready").json()["reason"] == "failed"
    status, told = unhealthy(client)
    assert status == "failed"
    for found in (told, error(client.post("/v1/completions", json=COMPLETION))):
        assert found["code"] == 503
        assert "no such architecture" in found["message"]
    assert client.get("/state").json()["failure"] == "no such architecture"
    assert client.get("/v1/models").status_code == 200


# --- the calls ----------------------------------------------------------------------------------


def test_sleep_answers_with_the_report(client):
    """A report that is lost, or a second sleep that claims to have done something."""
    report = client.post("/sleep?level=1&mode=abort").json()
    assert report["changed"] is True
    assert (report["level"], report["freed_bytes"], report["residual_bytes"]) == (1, 1500, 77)
    assert [tag["tag"] for tag in report["tag_reports"]] == ["weights", "kv_cache"]
    assert client.get("/is_sleeping").json() == {"is_sleeping": True}
    assert client.post("/sleep").json()["changed"] is False
    woken = client.post("/wake_up").json()
    assert (woken["changed"], woken["restored_bytes"]) == (True, 1500)
    assert client.get("/is_sleeping").json() == {"is_sleeping": False}
    assert client.post("/wake_up").json()["changed"] is False


@pytest.mark.parametrize(
    "query", ["tags=weights&tags=kv_cache", "tags=weights,kv_cache", "tags=weights,&tags=kv_cache"]
)
def test_tags_may_be_repeated_or_joined(client, query):
    """Only the last of several tags woken."""
    client.post("/sleep")
    assert len(client.post(f"/wake_up?{query}").json()["tag_reports"]) == 2
    assert len(client.post(f"/sleep?{query}").json()["tag_reports"]) == 2


def test_one_tag_at_a_time(client):
    """`is_sleeping` false before everything is back."""
    client.post("/sleep?level=2")
    report = client.post("/wake_up?tags=weights").json()
    assert report["missing"] == ["lm_head.weight"]
    assert client.get("/is_sleeping").json() == {"is_sleeping": True}
    found = error(client.post("/wake_up?tags=kv_cache"))
    assert (found["code"], found["type"]) == (409, "ConflictError")
    assert "lm_head.weight" in found["message"]


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/sleep?level=3", "level"),
        ("/sleep?level=one", "level"),
        ("/sleep?level=", "level"),
        ("/sleep?mode=gently", "mode"),
        ("/sleep?tags=wieghts", "tags"),
        ("/sleep?tags=", "tags"),
        ("/sleep?timeout=-1", "timeout"),
        ("/sleep?timeout=nan", "timeout"),
        ("/sleep?lvl=2", "lvl"),
        ("/wake_up?tags=all", "tags"),
        ("/wake_up?level=1", "level"),
        ("/pause?mode=x", "mode"),
        ("/pause?wait=1", "wait"),
        ("/resume?now=1", "now"),
        ("/reset_prefix_cache?x=1", "x"),
        ("/reload_weights?path=x", "path"),
    ],
)
def test_bad_values_are_400_naming_the_parameter(client, path, param):
    """vLLM's silent 200 for an unknown tag, level or parameter."""
    found = error(client.post(path))
    assert (found["code"], found["type"], found["param"]) == (400, "BadRequestError", f"query.{param}")
    assert client.get("/is_sleeping").json() == {"is_sleeping": False}


def test_conflicts_are_409(client):
    """A forbidden transition that answers 200, or 500."""
    client.post("/sleep?level=2")
    assert error(client.post("/sleep?level=1"))["code"] == 409
    assert error(client.post("/resume"))["code"] == 409


def test_pause_and_resume(client, engine):
    """`wake_up` undoing a pause; vLLM's parameters refused."""
    assert client.post("/pause?mode=keep&clear_cache=true").json() == {"status": "paused"}
    assert engine.prefix_resets == 0
    assert client.get("/is_paused").json() == {"is_paused": True}
    client.post("/wake_up")
    assert client.get("/is_paused").json() == {"is_paused": True}
    assert client.post("/resume").json() == {"status": "resumed"}
    assert client.get("/is_paused").json() == {"is_paused": False}
    client.post("/pause?wait_for_inflight_requests=true&clear_cache=true")
    assert engine.prefix_resets == 1


@pytest.mark.parametrize("mode", ["abort", "wait"])
@pytest.mark.parametrize(("path", "body"), PROTECTED)
def test_a_pause_that_ends_requests_answers_503_until_resumed(client, engine, path, body, mode):
    """A request that waits without a deadline, where the contract says 503."""
    client.post(f"/pause?mode={mode}").raise_for_status()
    response = client.post(path, json=body)
    found = error(response)
    assert (response.status_code, found["code"], found["type"]) == (503, 503, "ServiceUnavailableError")
    assert "/resume" in found["message"]
    assert int(response.headers["retry-after"]) >= 1
    assert engine.seen == []
    assert client.get("/health").status_code == 200
    client.post("/resume").raise_for_status()
    assert client.post(path, json=body).status_code != 503


def test_reload_weights_takes_an_optional_path(client, engine):
    """A body that is required, or a path that is dropped."""
    assert client.post("/reload_weights").json()["updated"] == 3
    assert client.post("/reload_weights", json={"path": "/x"}).status_code == 200
    assert engine.reloaded == [None, "/x"]
    assert error(client.post("/reload_weights", json={"pth": "/x"}))["param"] == "pth"
    assert client.post("/reset_prefix_cache").status_code == 200
    assert engine.prefix_resets == 1


def test_state_tells_what_waking_would_cost(client):
    """An operator who cannot see what is away, and how large it is."""
    awake = client.get("/state").json()
    assert (awake["status"], awake["ready"], awake["waking"]["restore_bytes"]) == ("ready", True, 0)
    assert awake["model"]["weights_bytes"] == 1000
    client.post("/sleep")
    asleep = client.get("/state").json()
    assert asleep["is_sleeping"] is True
    assert asleep["state"]["level"] == 1
    assert asleep["waking"]["tags"] == {"weights": 1000, "kv_cache": 500}
    assert asleep["waking"]["restore_bytes"] == 1000
    assert asleep["waking"]["backings"] == {"weights": "image", "kv_cache": None}
    client.post("/wake_up")
    assert client.get("/state").json()["waking"]["last_wake_s"] == 0.02


def test_the_pace_of_a_wake_is_that_of_the_last_wake_of_weights(client):
    """`The last wake took 0.0 ms` after one that lifted a pause, or brought back only the cache."""
    client.post("/sleep")
    client.post("/wake_up")
    client.post("/sleep?tags=kv_cache")
    assert client.get("/state").json()["waking"]["expected_s"] is None
    client.post("/wake_up")
    client.post("/sleep?level=2")
    client.post("/wake_up?tags=weights")
    assert client.get("/state").json()["waking"]["expected_s"] is None, "blank weights wait for who writes them"
    client.post("/sleep?level=2")
    waking = client.get("/state").json()["waking"]
    assert (waking["last_wake_s"], waking["expected_s"]) == (0.02, 0.02)


# --- policies -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "body"), PROTECTED[:4])
def test_policy_wake_serves(make_engine, client_of, path, body):
    """The early refusal ignoring the policy."""
    client = client_of(make_engine(on_sleeping_request="wake"))
    client.post("/sleep")
    assert client.post(path, json=body).status_code == 200
    assert client.get("/is_sleeping").json() == {"is_sleeping": False}


@pytest.mark.parametrize(("path", "body"), PROTECTED[:4])
def test_policy_hold_ends_with_the_503_at_its_deadline(make_engine, client_of, path, body):
    """A held request that hangs, or whose stream begins before it is admitted."""
    client = client_of(make_engine(on_sleeping_request="hold", hold_timeout_s=0.02))
    client.post("/sleep")
    assert client.post(path, json=body).content == SLEEPING


def test_the_503_is_what_the_contract_says():
    """The constant of this test drifting from the contract's body."""
    message = "Model is currently in sleep mode. Please wake it up first with a POST request to /wake_up"
    body = {"error": {"message": message, "type": "ModelSleepingError", "code": 503}}
    assert json.dumps(body).encode() == SLEEPING
