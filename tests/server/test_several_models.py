"""One app, several models: which of them a request is for, and that the others do not notice."""

import time

import pytest
from fake_engine import FakeEngine
from fastapi.testclient import TestClient

from shuteye.config import EngineConfig
from shuteye.errors import InvalidRequest
from shuteye.server.app import ServedEngine, create_app
from shuteye.server.config import ServerConfig


def engine_of(model, task="generate"):
    return FakeEngine(EngineConfig(model=model, enable_sleep_mode=True), task=task, script=[f"I am {model}"])


@pytest.fixture
def client():
    config = ServerConfig(dev_mode=True)
    others = [ServedEngine(engine_of("b"), config), ServedEngine(engine_of("vectors", task="embed"), config)]
    app = create_app(engine_of("a"), config, others=others)
    with TestClient(app, "http://localhost", raise_server_exceptions=False) as client:
        while any(client.get(f"/state?model={name}").json()["status"] != "ready" for name in ("a", "b", "vectors")):
            time.sleep(0.002)
        yield client


def text_of(client, **body):
    answer = client.post("/v1/completions", json={"prompt": "who?", "max_tokens": 32} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()["model"], answer.json()["choices"][0]["text"]


def test_a_request_is_answered_by_the_model_that_it_names(client):
    """Would catch an answer of the wrong model under the right name."""
    assert text_of(client, model="a") == ("a", "I am a")
    assert text_of(client, model="b") == ("b", "I am b")
    assert text_of(client) == ("a", "I am a")
    assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["a", "b", "vectors"]
    assert client.get("/v1/models/b").json()["id"] == "b"


def test_a_name_that_is_not_served_or_is_no_name_is_refused(client):
    """Would catch a request that goes to the default model by mistake."""
    for body in ({"model": "c"}, {"model": ""}):
        answer = client.post("/v1/completions", json={"prompt": "x"} | body)
        assert (answer.status_code, answer.json()["error"]["type"]) == (404, "NotFoundError")
        assert "'a', 'b', 'vectors'" in answer.json()["error"]["message"]
    assert client.post("/v1/completions", json={"prompt": "x", "model": 3}).status_code == 400
    assert client.get("/state?model=c").status_code == 404
    assert client.post("/sleep?model=a&model=b").status_code == 400


def test_the_task_that_counts_is_that_of_the_model(client):
    """Would catch a route that is refused because of what another model is for."""
    answer = client.post("/v1/embeddings", json={"model": "vectors", "input": "x"})
    assert answer.status_code == 200, answer.text
    assert client.post("/v1/embeddings", json={"model": "a", "input": "x"}).status_code == 400
    form = {"file": ("x.wav", b"no sound"), "model": (None, "b")}
    refused = client.post("/v1/audio/transcriptions", files=form)
    assert "'b'" in refused.json()["error"]["message"]


def test_a_model_sleeps_alone(client):
    """Would catch a call that puts the default model to sleep, or all of them."""
    assert client.post("/sleep?model=b&level=1").json()["changed"]
    sleeping = {name: client.get(f"/is_sleeping?model={name}").json()["is_sleeping"] for name in ("a", "b")}
    assert sleeping == {"a": False, "b": True}
    assert client.post("/v1/completions", json={"prompt": "x", "model": "b"}).status_code == 503
    assert text_of(client, model="a") == ("a", "I am a")
    assert client.post("/wake_up?model=b").json()["status"] == "awake"
    assert text_of(client, model="b") == ("b", "I am b")


def test_metrics_tell_of_each(client):
    """Would catch families that come twice, which Prometheus refuses, and a model that is never counted."""
    text_of(client, model="b")
    lines = client.get("/metrics").text.splitlines()
    heads = [line for line in lines if line.startswith("# TYPE")]
    assert len(heads) == len(set(heads))
    asked = [line for line in lines if line.startswith("shuteye_http_requests_total{") and "/v1/completions" in line]
    assert any('model_name="b"' in line for line in asked)
    assert not any('model_name="a"' in line for line in asked)


def test_two_models_of_one_name_are_refused():
    """Would catch a model that nobody can reach."""
    with pytest.raises(InvalidRequest, match="'a'"):
        create_app(engine_of("a"), ServerConfig(), others=[ServedEngine(engine_of("a"), ServerConfig())])
