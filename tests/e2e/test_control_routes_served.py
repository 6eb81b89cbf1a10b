"""The control routes, and what a sleeping server still answers, on a real engine."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from shuteye_server import SLEEPING_BODY, wait_for

CONTROL_ROUTES = (
    "POST /sleep",
    "POST /wake_up",
    "GET /is_sleeping",
    "POST /pause",
    "POST /resume",
    "GET /is_paused",
    "POST /reload_weights",
    "POST /reset_prefix_cache",
)
INFERENCE_ROUTES = ("GET /v1/models", "GET /state", "GET /metrics")
OPEN_ROUTES = ("GET /health", "GET /ready", "GET /ping", "GET /version")


def tags(report, field="residency"):
    """By tag, from the answer to a call, or from the state."""
    return {tag["tag"]: tag[field] for tag in report.get("tag_reports") or report["tags"]}


def image_pages(server):
    """Bytes of the weight image that are in the engine process's memory, by the kernel's account."""
    image_dir = server.get("/state").json()["model"]["image_dir"]
    resident, inside = 0, False
    for line in Path(f"/proc/{server.engine_pid}/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):
            inside = image_dir in rest
        elif inside and first == "Rss:":
            resident += int(rest.split()[0]) * 1024
    return resident


def completes(server, prompt="x"):
    return server.post("/v1/completions", model=server.model, prompt=prompt, max_tokens=2)


class TestTheTable:
    def test_sleeping_twice_changes_nothing_the_second_time(self, server):
        """A second sleep that frees again what is gone, or fails."""
        first, second = server.done("/sleep"), server.done("/sleep?level=1")
        assert (first["changed"], second["changed"], second["level"]) == (True, False, 1)
        assert first["freed_bytes"] > 0
        assert second["freed_bytes"] == 0
        assert server.done("/wake_up")["changed"] is True
        assert server.done("/wake_up")["changed"] is False

    def test_deeper_is_allowed_and_shallower_is_a_conflict(self, server, right):
        """A level 2 that pretends to keep weights that are gone."""
        server.done("/sleep?level=1")
        assert server.done("/sleep?level=2")["changed"] is True
        status, kind, message = server.refused("/sleep?level=1")
        assert (status, kind) == (409, "ConflictError")
        assert "level 1" in message
        assert server.refused("/sleep?level=0")[0] == 409
        assert server.done("/wake_up")["weights_source"]
        assert server.complete("deep") == right("deep")

    def test_tags_sleep_and_wake_apart(self, server, right):
        """A tag that takes the other along, or a gate that opens with one of them away."""
        report = server.done("/sleep?tags=kv_cache")
        assert tags(server.get("/state").json()["state"]) == {"weights": "resident", "kv_cache": "discarded"}
        assert tags(report, "freed_bytes").get("weights", 0) == 0
        assert completes(server).content == SLEEPING_BODY
        server.done("/wake_up?tags=weights,kv_cache")
        server.done("/sleep?tags=weights&tags=kv_cache")
        server.done("/wake_up?tags=kv_cache")
        assert tags(server.get("/state").json()["state"]) == {"weights": "offloaded", "kv_cache": "resident"}
        assert completes(server).content == SLEEPING_BODY
        assert server.get("/is_sleeping").json() == {"is_sleeping": True}
        server.done("/wake_up?tags=weights")
        assert server.complete("tags") == right("tags")

    @pytest.mark.parametrize(
        ("path", "param"),
        [
            ("/sleep?tags=weight", "tags"),
            ("/sleep?tags=", "tags"),
            ("/wake_up?tags=kv_cache&tags=layers", "tags"),
            ("/sleep?level=3", "level"),
            ("/sleep?level=-1", "level"),
            ("/sleep?level=one", "level"),
            ("/sleep?mode=gently", "mode"),
            ("/sleep?mode=", "mode"),
            ("/sleep?timeout=-1", "timeout"),
            ("/sleep?tag=weights", "tag"),
            ("/pause?mode=gently", "mode"),
        ],
    )
    @pytest.mark.parametrize("asleep", [False, True])
    def test_what_it_does_not_know_is_400_and_changes_nothing(self, server, path, param, asleep):
        """A silent 200, as for an unknown tag elsewhere, or a 422."""
        if asleep:
            server.done("/sleep")
        before = server.get("/state").json()["state"]
        answer = server.post(path)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, f"query.{param}"), answer.text
        assert server.get("/state").json()["state"] == before

    def test_resume_asleep_is_a_conflict(self, server):
        """Requests that run on released memory."""
        server.done("/pause")
        server.done("/sleep")
        status, kind, message = server.refused("/resume")
        assert (status, kind) == (409, "ConflictError")
        assert "/wake_up" in message
        server.done("/wake_up")
        assert server.get("/is_paused").json() == {"is_paused": True}, "a wake undid the pause"
        assert server.get("/is_sleeping").json() == {"is_sleeping": False}
        server.done("/resume")
        assert server.get("/is_paused").json() == {"is_paused": False}
        assert completes(server).status_code == 200

    def test_level_2_never_serves_unloaded_weights(self, server, right):
        """Tokens computed from blank memory."""
        server.done("/sleep?level=2")
        report = server.done("/wake_up?tags=weights")
        assert report["missing"]
        assert tags(server.get("/state").json()["state"]) == {"weights": "blank", "kv_cache": "discarded"}
        assert completes(server).content == SLEEPING_BODY
        status, kind, message = server.refused("/wake_up?tags=kv_cache")
        assert (status, kind) == (409, "ConflictError")
        assert report["missing"][0] in message
        assert completes(server).content == SLEEPING_BODY
        update = server.done("/reload_weights")
        assert (update["updated"], update["missing"]) == (len(report["missing"]), [])
        assert completes(server).content == SLEEPING_BODY, "there is no KV cache yet"
        assert server.done("/wake_up?tags=kv_cache")["canary"] is True
        assert server.complete("reloaded") == right("reloaded")

    def test_reload_needs_mapped_weights_and_keeps_the_model(self, server, right):
        """Weights written where nothing is mapped, or a reload that changes the model."""
        server.done("/sleep")
        assert server.refused("/reload_weights")[0] == 409
        server.done("/wake_up")
        assert server.done("/reload_weights")["updated"] > 0
        assert server.complete("again") == right("again")
        assert server.refused("/reload_weights", path="/nowhere")[0] < 500

    def test_a_prompt_is_computed_anew_after_a_sleep_and_a_reset(self, server, right):
        """A prefix cache that vouches for KV that is gone."""
        prompt = "a prompt of more than two blocks, so that there is something to hit"

        def ask():
            answer = server.done("/v1/completions", **server.request(prompt))
            assert answer["choices"][0]["text"] == right(prompt)
            return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

        server.done("/reset_prefix_cache")
        assert ask() == 0
        assert ask() > 0
        server.done("/reset_prefix_cache")
        assert ask() == 0
        server.done("/sleep")
        server.done("/wake_up")
        assert ask() == 0


class TestAsleep:
    @pytest.mark.parametrize("level", [1, 2])
    def test_what_needs_no_weights_works(self, server, level):
        """A server that looks dead because its model sleeps."""
        awake = {path: server.get(path).json() for path in ("/v1/models", "/health", "/ping", "/version")}
        text = "tokens, please: é"
        tokens = server.done("/tokenize", prompt=text)
        server.done(f"/sleep?level={level}")
        assert {path: server.get(path).json() for path in awake} == awake
        assert server.done("/tokenize", prompt=text) == tokens
        assert tokens["count"] == len(text.encode())
        assert server.done("/detokenize", tokens=tokens["tokens"]) == {"prompt": text}
        assert server.done("/tokenize", messages=[{"role": "user", "content": "x"}])["count"] > 1

    def test_ready_state_and_health(self, server):
        """Readiness taken for liveness, or a state that does not say what a wake costs."""
        awake = server.get("/state").json()
        assert (awake["ready"], awake["status"], awake["state"]["gate"]) == (True, "ready", "open")
        assert awake["state"]["level"] is None
        report = server.done("/sleep")
        ready = server.get("/ready")
        assert (ready.status_code, ready.json()) == (503, {"ready": False, "reason": "sleeping"})
        assert server.get("/health").status_code == 200
        asleep = server.get("/state").json()
        assert (asleep["ready"], asleep["is_sleeping"], asleep["status"]) == (False, True, "ready")
        assert (asleep["state"]["gate"], asleep["state"]["level"]) == ("closed", 1)
        assert tags(asleep["state"]) == tags(report) == {"weights": "offloaded", "kv_cache": "discarded"}
        assert tags(asleep["state"], "resident_bytes") == {"weights": 0, "kv_cache": 0}
        assert asleep["waking"]["restore_bytes"] == asleep["model"]["weights_bytes"]
        assert asleep["waking"]["backings"]["weights"] == "image"
        assert asleep["model"] == awake["model"]

    def test_metrics(self, server):
        """Gauges that stay as they were when the model fell asleep."""
        assert server.metric("shuteye_is_sleeping") == 0
        assert server.metric("shuteye_tag_resident_bytes", tag="weights") > 0
        freed = server.metric("shuteye_sleep_freed_bytes_total")
        report = server.done("/sleep")
        assert server.metric("shuteye_is_sleeping") == 1
        assert server.metric("shuteye_tag_resident_bytes") == 0
        assert server.metric("shuteye_tag_residency", tag="weights", residency="offloaded") == 1
        assert server.metric("shuteye_tag_residency", tag="weights", residency="resident") == 0
        assert server.metric("shuteye_tag_residency", tag="kv_cache", residency="discarded") == 1
        assert server.metric("shuteye_sleep_freed_bytes_total") == freed + report["freed_bytes"]
        assert server.metric("shuteye_sleep_residual_bytes") == report["residual_bytes"]
        assert server.metric("shuteye_num_requests_running") == 0

    def test_metrics_of_a_kv_cache_that_fills(self, server):
        """A KV cache that holds memory and says that it does not."""
        server.complete("fills some blocks of the KV cache")
        assert server.metric("shuteye_tag_resident_bytes", tag="kv_cache") > 0

    def test_metrics_of_held_requests(self, holding):
        """An operator who sees no queue in front of a sleeping model."""
        holding.done("/sleep")
        with ThreadPoolExecutor() as pool:
            held = pool.submit(holding.complete, "held")
            try:
                wait_for(lambda: holding.metric("shuteye_num_requests_waiting") == 1, "a waiting request")
            finally:
                holding.done("/wake_up")
                held.result()

    def test_the_kernel_agrees(self, server):
        """A report of freed bytes that are still there."""
        assert image_pages(server) > 0
        report = server.done("/sleep")
        assert image_pages(server) == 0
        assert tags(report, "freed_bytes")["weights"] >= server.get("/state").json()["model"]["weights_bytes"]
        server.done("/wake_up")
        assert image_pages(server) > 0

    def test_other_tasks_routes_say_so(self, server):
        """404 for a route that other models have."""
        answer = server.post("/v1/embeddings", model=server.model, input="x")
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "BadRequestError")
        assert "embed" in answer.json()["error"]["message"]


class TestKeys:
    @pytest.fixture
    def statuses(self, holding):
        """How routes answer a caller with this key; the model is asleep, so that nothing changes."""

        def ask(key, routes):
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            with httpx2.Client(base_url=holding.url, headers=headers, timeout=30) as client:
                found = {client.request(*route.split()).status_code for route in routes}
            return found

        return ask

    def test_open_routes_need_no_key(self, statuses):
        """Probes that must know a secret."""
        assert statuses(None, OPEN_ROUTES) == {200}

    @pytest.mark.parametrize(
        ("key", "control", "inference"),
        [
            (None, 401, 401),
            ("wrong", 401, 401),
            ("sk-inference", 403, 200),
            ("sk-admin", 200, 200),
        ],
    )
    def test_every_key_opens_its_routes_and_no_others(self, holding, statuses, key, control, inference):
        """An inference key that opens a control route, or one that opens nothing."""
        assert statuses(key, CONTROL_ROUTES[2:] if control == 200 else CONTROL_ROUTES) == {control}
        assert statuses(key, INFERENCE_ROUTES) == {inference}
        assert holding.get("/is_sleeping").json() == {"is_sleeping": False}
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        body = {"model": holding.model, "prompt": "x", "max_tokens": 1}
        answer = httpx2.post(f"{holding.url}/v1/completions", json=body, headers=headers, timeout=30)
        assert answer.status_code == inference

    def test_waking_with_the_admin_key(self, holding):
        """A sleep that the admin key does not open."""
        assert holding.done("/sleep")["changed"] is True
        assert holding.done("/wake_up")["changed"] is True
