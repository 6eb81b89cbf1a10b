"""Several models behind one port: a budget that does not hold them all, sleeps, deaths, an end."""

import concurrent.futures
import os
import signal

import pytest
from shuteye_server import Served, engines_below, is_running, stop_all, wait_for

from shuteye.config import EngineConfig
from shuteye.models.converter import Order, obtain_image
from shuteye.models.progress import no_progress
from shuteye.parallel.shards import ONE_RANK
from shuteye.testing import tiny_model

BUDGET = "70MiB"
"""Less than three take: each some 15 MiB and its KV cache, and more than that before it was measured."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three tiny checkpoints with their images in one cache."""
    directory = tmp_path_factory.mktemp("fleet")
    paths = [tiny_model(directory / f"model-{seed}", seed=seed) for seed in range(3)]
    for path in paths:
        config = EngineConfig(str(path), cache_dir=directory / "cache")
        obtain_image(Order.of(config, ONE_RANK), no_progress).close()
    return [str(path) for path in paths], directory / "cache"


@pytest.fixture(scope="module")
def server(models):
    (first, *others), cache = models
    flags = ("--dev-mode", "--memory-budget", BUDGET, "--max-kv-cache-memory", "32MiB", "--min-awake-seconds", "0")
    server = Served(first, *others, *flags, "--num-threads", "1", "--enable-sleep-mode", cache_dir=cache)
    try:
        server.wait_until_ready()
        for model in others:
            wait_for(lambda model=model: state(server, model)["status"] in ("ready", "unloaded"), "all models", 60)
        yield server
    finally:
        stop_all([server])


def state(server, model):
    return server.get(f"/state?model={model}").json()


def answer(server, model, prompt="hello"):
    body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0}
    response = server.http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def test_every_model_answers_as_itself_whoever_sleeps(server, models):
    """Would catch a request that finds its model asleep, a wrong model's answer, and a budget that is only told."""
    names, _cache = models
    expected = {name: answer(server, name) for name in names}
    assert len(set(expected.values())) == len(names)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        asked = [names[i % 3] for i in range(24)]
        assert list(pool.map(lambda name: answer(server, name), asked)) == [expected[name] for name in asked]
    assert any(state(server, name)["is_sleeping"] for name in names), "the budget held all three"


def test_what_an_operator_puts_to_sleep_stays_asleep(server, models):
    """Would catch a fleet that wakes what somebody wants to sleep, or that no call wakes again."""
    name = models[0][1]
    before = answer(server, name)
    assert server.http.post("/unload", params={"model": name}).json()["level"] == 2
    assert state(server, name)["status"] == "unloaded"
    refused = server.http.post("/v1/completions", json={"model": name, "prompt": "x"})
    assert (refused.status_code, refused.json()["error"]["type"]) == (503, "ModelSleepingError")
    assert server.http.post("/wake_up", params={"model": name}).json()["changed"]
    assert answer(server, name) == before


def test_a_killed_engine_takes_no_other_with_it_and_comes_back(server, models):
    """Would catch a server that ends with one of its models, and a model that must be started by hand."""
    names, _cache = models
    expected = {name: answer(server, name) for name in names}
    for killed in names * 2:  # also in between two requests, and while it makes room for others
        assert answer(server, killed) == expected[killed]
        (rank,) = state(server, killed)["state"]["ranks"]
        os.kill(rank["pid"], signal.SIGKILL)
        wait_for(lambda pid=rank["pid"]: not is_running(pid), "its end")
        assert {name: answer(server, name) for name in names} == expected


def test_nothing_is_left_of_it(server):
    """Would catch an engine that outlives the server, or a server that waits for one."""
    engines = engines_below(server.zygote_pid)
    assert engines
    server.tell(signal.SIGTERM)
    assert server.ended(within_s=20) == 0
    assert not any(map(is_running, engines))
