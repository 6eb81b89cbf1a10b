"""GET /metrics."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from shuteye.errors import EngineDead
from shuteye.state import BucketCounts, EngineState, RankState, SchedulerStats, TagState

COMPLETION = {"prompt": "abc", "max_tokens": 4}


def scrape(client):
    """Samples as {name: {labels sorted by name, without the model's: value}}."""
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    samples: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            assert sample.labels.pop("model_name") == "tiny"
            labels = tuple(value for _, value in sorted(sample.labels.items()))
            samples.setdefault(sample.name, {})[labels] = sample.value
    return samples


def test_metrics_have_vllms_names_if_wanted(make_engine, client_of):
    """Dashboards made for vLLM that stay empty."""
    client = client_of(make_engine(), metrics_prefix="both")
    client.post("/v1/completions", json=COMPLETION | {"n": 2})
    found = {family.name for family in text_string_to_metric_families(client.get("/metrics").text)}
    for name in ("engine_sleep_state", "request_params_n", "request_params_max_tokens", "cache_config_info"):
        assert {f"vllm:{name}", f"shuteye_{name}"} <= found
    assert {"http_requests", "vllm:request_inference_time_seconds"} <= found
    only = client_of(make_engine(), metrics_prefix="vllm").get("/metrics").text
    assert "shuteye" not in only


def test_requests_are_counted_by_how_they_finished(client):
    """Requests lost from, or counted twice in, the dashboards."""
    client.post("/v1/completions", json=COMPLETION | {"n": 2})
    client.post("/v1/completions", json=COMPLETION | {"prompt": ["ab", "cd"], "stop": "b", "stream": True})
    finished = scrape(client)["shuteye_request_success_total"]
    assert finished == {("length",): 3, ("stop",): 1}


@pytest.mark.parametrize("stream", [False, True])
def test_latencies_count_tokens_of_streams_and_whole_answers_alike(client, stream):
    """Latencies known only for streams."""
    client.post("/v1/completions", json=COMPLETION | {"stream": stream})
    found = scrape(client)
    assert found["shuteye_time_to_first_token_seconds_count"] == {(): 1}
    assert found["shuteye_inter_token_latency_seconds_count"] == {(): 3}
    assert found["shuteye_e2e_request_latency_seconds_count"] == {(): 1}


def test_errors_are_counted(make_engine, client_of):
    """An engine that fails every request, and looks idle."""
    client = client_of(make_engine(breakage=EngineDead("gone")))
    client.post("/v1/completions", json=COMPLETION)
    found = scrape(client)
    assert found["shuteye_request_failure_total"] == {("error",): 1}
    assert "shuteye_request_success_total" not in found


def test_the_engines_snapshot_is_shown(client, engine):
    """Gauges that never move."""
    engine.stats = SchedulerStats(
        num_running=2,
        num_waiting=3,
        num_blocks=10,
        num_free_blocks=4,
        num_prompt_tokens_total=50,
        num_generation_tokens_total=60,
        num_prefix_queries_total=70,
        num_prefix_hits_total=8,
        num_preemptions_total=9,
        step_tokens=BucketCounts((3, 0, 1, *[0] * 10, 1), 20_020),
        preemptions=BucketCounts((4, 1, 0, 0, 0, 0, 0), 1),
    )
    found = scrape(client)
    assert found["shuteye_num_requests_running"] == {(): 2}
    assert found["shuteye_num_requests_waiting"] == {(): 3}
    assert found["shuteye_kv_cache_usage_perc"] == {(): 0.6}
    assert found["shuteye_prompt_tokens_total"] == {(): 50}
    assert found["shuteye_generation_tokens_total"] == {(): 60}
    assert found["shuteye_prefix_cache_queries_total"] == {(): 70}
    assert found["shuteye_prefix_cache_hits_total"] == {(): 8}
    assert found["shuteye_num_preemptions_total"] == {(): 9}
    steps, preemptions = "shuteye_iteration_tokens_total", "shuteye_request_num_preemptions"
    assert (found[f"{steps}_count"], found[f"{steps}_sum"]) == ({(): 5}, {(): 20_020})
    assert [found[f"{steps}_bucket"][at,] for at in ("1.0", "8.0", "16.0", "16384.0", "+Inf")] == [3, 3, 4, 4, 5]
    assert (found[f"{preemptions}_count"], found[f"{preemptions}_sum"]) == ({(): 5}, {(): 1})


def test_sleep_is_shown_per_tag_and_transitions_by_outcome(client):
    """A sleeping model that cannot be told from a waking one."""
    client.post("/sleep")
    client.post("/sleep")
    asleep = scrape(client)
    assert asleep["shuteye_is_sleeping"] == {(): 1}
    assert asleep["shuteye_tag_resident_bytes"] == {("weights",): 0, ("kv_cache",): 0}
    where = {labels for labels, value in asleep["shuteye_tag_residency"].items() if value}
    assert where == {("offloaded", "weights"), ("discarded", "kv_cache")}
    assert asleep["shuteye_sleep_freed_bytes_total"] == {(): 1500}
    assert asleep["shuteye_sleep_residual_bytes"] == {(): 77}
    client.post("/wake_up")
    client.post("/sleep?level=7")
    found = scrape(client)
    assert found["shuteye_is_sleeping"] == {(): 0}
    assert found["shuteye_transitions_total"] == {
        ("call", "changed", "sleep"): 1,
        ("call", "unchanged", "sleep"): 1,
        ("call", "changed", "wake_up"): 1,
        ("call", "InvalidRequest", "sleep"): 1,
    }
    assert found["shuteye_transition_seconds_count"] == {("sleep",): 2, ("wake_up",): 1}


def test_ranks_are_shown_one_by_one(client, engine):
    """A dead rank, or one that holds more than its share, behind a sum."""
    tags = (TagState("weights", "resident", "image", 8, 7),)
    engine.state = EngineState(ranks=(RankState(0, "", "a", 1, tags), RankState(1, "", "b", 2, failure="ended")))
    found = scrape(client)
    assert found["shuteye_rank_up"] == {("a", "0"): 1, ("b", "1"): 0}
    assert found["shuteye_rank_resident_bytes"] == {("0", "weights"): 7}


def test_apps_do_not_share_metrics(make_engine, client_of):
    """A global registry: two apps in a process collide."""
    first, second = client_of(make_engine()), client_of(make_engine())
    first.post("/v1/completions", json=COMPLETION)
    assert "shuteye_request_success_total" in scrape(first)
    assert "shuteye_request_success_total" not in scrape(second)


def test_phases_and_sizes_of_requests(client):
    """A slow answer of which nobody can tell whether it waited, read or wrote."""
    client.post("/v1/completions", json=COMPLETION)
    found = scrape(client)
    for phase in ("queue", "prefill", "decode"):
        assert found[f"shuteye_request_{phase}_time_seconds_count"] == {(): 1}
    assert found["shuteye_request_prompt_tokens_sum"] == {(): 3}
    assert found["shuteye_request_generation_tokens_sum"] == {(): 4}


def test_wakes_by_policy_are_transitions_too(make_engine, client_of):
    """A model that is woken all day, and never according to its metrics."""
    client = client_of(make_engine(on_sleeping_request="wake"))
    client.post("/sleep")
    assert client.get("/state").json()["waking"]["expected_s"] is None
    client.post("/v1/completions", json=COMPLETION)
    found = scrape(client)
    assert found["shuteye_transitions_total"] == {
        ("call", "changed", "sleep"): 1,
        ("request", "changed", "wake_up"): 1,
    }
    assert found["shuteye_transition_seconds_sum"][("wake_up",)] == 0.02
    assert found["shuteye_wake_restored_bytes_total"] == {(): 1500}
    client.post("/sleep?tags=weights")
    waking = client.get("/state").json()["waking"]
    assert (waking["restore_bytes"], waking["last_wake_s"]) == (1000, 0.02)
    assert waking["expected_s"] == pytest.approx(0.02)


def test_the_sleep_state_is_vllms_too(client):
    """A dashboard made for vLLM that shows nothing."""
    states = []
    for path in ("/sleep?level=1", "/sleep?level=2", "/wake_up"):
        client.post(path)
        states += [name for (name,), value in scrape(client)["shuteye_engine_sleep_state"].items() if value]
    assert states == ["weights_offloaded", "discard_all", "awake"]


def test_answers_are_counted_by_route_and_status(make_engine, client_of):
    """Refusals while asleep that no figure shows; a series for every path that a scanner tries."""
    client = client_of(make_engine())
    client.post("/sleep")
    client.post("/v1/completions", json=COMPLETION)
    for path in ("/a", "/b", "/v1/models/x", "/v1/models/y"):
        client.get(path)
    found = scrape(client)["shuteye_http_requests_total"]
    assert found[("POST", "/v1/completions", "503")] == 1
    assert found[("", "other", "404")] == 2
    assert found[("GET", "/v1/models/{name:path}", "404")] == 2


def test_methods_that_are_none_are_counted_together(client):
    """A series for every method that a caller makes up."""
    for index in range(20):
        client.request(f"MADEUP{index}", "/health")
        client.request("get", f"/madeup/{index}")
    found = scrape(client)["shuteye_http_requests_total"]
    assert {labels for labels in found if "METRICS" not in labels} <= {
        ("other", "/health", "405"), ("", "other", "404"), ("GET", "/ready", "200"), ("GET", "/metrics", "200"),
    }  # fmt: skip
    assert found[("other", "/health", "405")] == 20
