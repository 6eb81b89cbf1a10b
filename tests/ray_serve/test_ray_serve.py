"""Two applications of two replicas each behind Ray Serve's own proxy, with real engines. Run with make test-ray."""

import json
import os
import signal
import threading
import time
from dataclasses import replace

import pytest
from serve_cluster import Cluster, parent_of, pss_of
from shuteye_server import SLEEPING_BODY, is_running, shuteye, wait_for

from shuteye import LLM, EngineConfig, SamplingParams
from shuteye.client import Client
from shuteye.errors import InvalidRequest
from shuteye.ray.settings import ReplicaSettings
from shuteye.server.config import ServerConfig
from shuteye.testing import tiny_model

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`"),  # Ray's own
]

NAME = "tiny"
MESSAGES = [{"role": "user", "content": "What is the time?"}]
GREEDY = {"model": NAME, "temperature": 0, "ignore_eos": True}
MIB = 2**20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Some 25 MB of weights, so that what a sleep gives back can be told from noise."""
    path = tmp_path_factory.mktemp("serve") / "model"
    return tiny_model(path, hidden_size=256, intermediate_size=1024, num_layers=6)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("serve-cache")


@pytest.fixture(scope="module")
def right(checkpoint, cache_dir):
    """What one engine answers; it has ended by the time that others share the image's pages."""
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    with LLM(checkpoint, cache_dir=cache_dir, kv_cache_memory=4 * MIB, num_threads=1) as llm:
        return llm.chat(MESSAGES, params)[0].outputs[0].text


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = Cluster(num_cpus=8)
        try:
            yield cluster
        finally:
            cluster.close()


@pytest.fixture(scope="module")
def settings(checkpoint, cache_dir):
    def of(policy, **more):
        engine = EngineConfig(
            model=str(checkpoint), enable_sleep_mode=True, on_sleeping_request=policy, cache_dir=cache_dir,
            kv_cache_memory=4 * MIB, kernels="torch",  # slow enough for a client to go before the end
        )  # fmt: skip
        return ReplicaSettings(engine, ServerConfig(dev_mode=True, served_model_name=(NAME,)), **more)

    return of


@pytest.fixture(scope="module")
def rejecting_app(cluster, settings, right):  # which has built the image by then
    return cluster.run("rejecting", settings("reject"), num_replicas=2)


@pytest.fixture
def app(rejecting_app):
    """Two replicas that reject requests while they sleep; awake."""
    rejecting_app.restore()
    return rejecting_app


@pytest.fixture(scope="module")
def idle_app(cluster, settings, rejecting_app):
    """Two replicas under another path that sleep for want of requests, and wake for them."""
    return cluster.run("idle", settings("wake", idle_sleep_s=2.0), prefix="/idle", num_replicas=2)


def chat(app, **more):
    return app.post("/v1/chat/completions", messages=MESSAGES, max_tokens=24, **GREEDY, **more)


def text_of(response):
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def asked_of_both(app):
    """Chats until each replica has answered; their texts."""
    texts, before = [], tokens_of(app)
    while not all(now > before[name] for name, now in tokens_of(app).items()):
        assert len(texts) < 200, "all requests go to one replica"
        texts += [text_of(chat(app)) for _ in range(4)]
    return texts


def tokens_of(app):
    return {name: one["stats"]["num_generation_tokens_total"] for name, one in app.state()["replicas"].items()}


def test_both_replicas_answer_as_one_engine_does(app, right):
    assert set(asked_of_both(app)) == {right}


def test_a_stream_comes_through_the_proxy_piece_by_piece(app, right):
    with app.http.stream(
        "POST", "/v1/chat/completions",
        json=GREEDY | {"messages": MESSAGES, "max_tokens": 24, "stream": True},
    ) as response:  # fmt: skip
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert response.headers["content-type"].startswith("text/event-stream")
    assert lines[-1] == "[DONE]"
    pieces = [json.loads(line)["choices"][0]["delta"].get("content") or "" for line in lines[:-1]]
    assert "".join(pieces) == right
    assert sum(map(bool, pieces)) > 5


def test_a_stream_is_there_before_its_end_and_ends_with_its_client(app):
    """A proxy that collects the answer; or an engine that computes for a client that went long ago."""
    before = app.state()["stats"]["num_generation_tokens_total"]
    body = GREEDY | {"prompt": "a", "max_tokens": 480, "stream": True}
    with app.http.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
        assert app.state()["stats"]["num_running"] == 1
    wait_for(lambda: app.state()["stats"]["num_running"] == 0, "the end of the request", 10)
    assert app.state()["stats"]["num_generation_tokens_total"] - before < 480


def test_one_request_id_comes_back(app):
    response = app.http.get("/ping", headers={"X-Request-Id": "mine"})
    assert response.headers.get_list("x-request-id") == ["mine"]


def test_sleep_over_http_gives_back_the_memory_of_every_replica(app, right):
    asked_of_both(app)
    engines = app.engines()
    before = {name: pss_of(pid) for name, pid in engines.items()}
    weights = next(iter(app.state()["replicas"].values()))["model"]["weights_bytes"]
    answer = app.done("/sleep?level=1")
    after = {name: pss_of(pid) for name, pid in engines.items()}
    assert {each["replica"] for each in answer["replicas"]} == set(engines)
    assert all(each["report"]["freed_bytes"] >= weights for each in answer["replicas"])
    for name in engines:  # the two share the pages of the image
        assert before[name] - after[name] > 0.4 * weights, (before, after)
    assert sum(before.values()) - sum(after.values()) > 0.9 * weights
    assert app.sleeping() == dict.fromkeys(engines, True)
    refused = chat(app)
    assert (refused.status_code, refused.content) == (503, SLEEPING_BODY)
    app.done("/wake_up")
    assert app.sleeping() == dict.fromkeys(engines, False)
    assert set(asked_of_both(app)) == {right}


def test_the_handle_reaches_every_replica(app, right):
    report = app.control.sleep.remote(level=2).result()
    assert [outcome.report.level for outcome in report.outcomes] == [2, 2]
    assert all(app.sleeping().values())
    assert app.control.is_sleeping.remote().result() is True
    again = app.control.sleep.remote(level=2).result()
    assert [outcome.report.changed for outcome in again.outcomes] == [False, False]
    with pytest.raises(InvalidRequest, match="level must be 0, 1 or 2"):
        app.control.sleep.remote(level=3).result()
    app.control.wake_up.remote().result()
    assert set(asked_of_both(app)) == {right}


def test_two_clients_at_once_leave_all_replicas_alike(app):
    answers = []

    def call(path):
        answers.extend(app.post(path).status_code for _ in range(8))

    threads = [threading.Thread(target=call, args=(path,)) for path in ("/sleep", "/wake_up")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 16
    state = app.state()
    assert len(set(app.sleeping().values())) == 1
    assert state["is_sleeping"] == bool(state["wanted"]["asleep"])


def test_a_replica_that_is_killed_asleep_comes_up_asleep_and_leaves_no_engine(app, right):
    app.done("/sleep")
    name, engine = next(iter(app.engines().items()))
    os.kill(parent_of(engine), signal.SIGKILL)
    wait_for(lambda: not is_running(engine), "the end of the engine with its replica", 10)
    state = app.wait_for_replicas(2, other_than=[name])
    assert all(each["is_sleeping"] for each in state["replicas"].values())
    app.done("/wake_up")
    assert set(asked_of_both(app)) == {right}


def test_a_replica_whose_engine_died_is_named_and_replaced(app, right):
    name, engine = next(iter(app.engines().items()))
    (other,) = set(app.engines()) - {name}
    os.kill(engine, signal.SIGKILL)
    wait_for(lambda: not is_running(engine), "the end of the engine")
    answer = app.post("/sleep")
    assert answer.status_code == 503
    body = answer.json()
    assert body["error"]["type"] == "ReplicasFailedError"
    assert f"1 of 2 replicas failed to sleep: replica {name}: EngineDead" in body["error"]["message"]
    assert [each["replica"] for each in body["replicas"] if each["report"]] == [other]
    state = app.wait_for_replicas(2, other_than=[name])
    assert all(each["is_sleeping"] for each in state["replicas"].values()), "the new one comes up as was wanted"
    app.done("/wake_up")
    assert set(asked_of_both(app)) == {right}


def test_a_control_that_is_killed_remembers_what_is_wanted(app):
    names = set(app.engines())
    app.done("/sleep?level=2")
    app.kill_control()
    wait_for(lambda: (state := app.http.get("/state")).status_code == 200 and len(state.json()["replicas"]) == 2,
             "the return of the control", 60)  # fmt: skip
    state = app.state()
    assert set(state["replicas"]) == names, "no replica had to be replaced for it"
    assert state["wanted"]["level"] == 2
    app.done("/wake_up")
    assert not any(app.sleeping().values())


def test_a_replica_that_is_added_while_all_sleep_comes_up_asleep(app, cluster, settings):
    app.done("/sleep")
    cluster.run("rejecting", settings("reject"), num_replicas=3)
    try:
        state = app.wait_for_replicas(3)
        assert all(each["is_sleeping"] for each in state["replicas"].values())
        assert len(app.done("/wake_up")["replicas"]) == 3
    finally:
        cluster.run("rejecting", settings("reject"), num_replicas=2)
        app.wait_for_replicas(2)


def test_clients_and_commands_take_the_proxy_for_a_server(app):
    url = str(app.http.base_url)
    with Client(url) as client:
        assert client.sleep(level=2).level == 2
        state = client.state()
        assert (client.is_sleeping(), state.is_sleeping, state.state.level) == (True, True, 2)
        assert len(state.state.ranks) == 2, "the processes of both replicas"
        shown = shuteye("ps", "--url", url)
        assert shown.returncode == 0, shown.stderr
        assert NAME in shown.stdout
        assert client.wake_up().restored_bytes >= 2 * state.model.weights_bytes
    assert shuteye("sleep", "--url", url).returncode == 0
    assert all(app.sleeping().values())


def test_a_replica_of_several_ranks(cluster, settings, right):
    """One replica over two ranks: its own processes, which sleep, wake and end with it."""
    several = settings("reject")
    engine = replace(several.engine, tensor_parallel_size=2)
    app = cluster.run("ranks", replace(several, engine=engine), prefix="/ranks", num_replicas=1)
    try:
        assert text_of(chat(app)) == right
        (state,) = app.state()["replicas"].values()
        ranks = [rank["pid"] for rank in state["state"]["ranks"]]
        assert len(ranks) == 2
        app.done("/sleep?level=2")
        assert all(app.sleeping().values())
        app.done("/wake_up")
        assert text_of(chat(app)) == right
    finally:
        cluster.delete("ranks")
    wait_for(lambda: not any(map(is_running, ranks)), "the end of the ranks", 20)


def test_replicas_sleep_for_want_of_requests_and_wake_for_one(idle_app, right):
    wait_for(lambda: all(idle_app.sleeping().values()), "sleeping for want of requests", 30)
    assert text_of(chat(idle_app)) == right
    assert sorted(idle_app.sleeping().values()) == [False, True], "only the replica that was asked is awake"
    wait_for(lambda: all(idle_app.sleeping().values()), "sleeping again", 30)
    assert not idle_app.state()["wanted"]["asleep"], "nobody has asked for it"


def test_requests_while_replicas_fall_asleep_are_all_answered(idle_app, right):
    """A request that comes while an idle replica is on its way to sleep."""
    texts = []
    for pause_s in (1.9, 1.95, 2.0, 2.05, 2.1, 2.15, 2.2):
        time.sleep(pause_s)
        texts += [text_of(chat(idle_app)) for _ in range(3)]
    assert set(texts) == {right}
