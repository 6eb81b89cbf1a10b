"""The client against a mock server: parsing, errors, and the waking transport under real concurrency."""

import asyncio
import io
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx2
import openai
import pytest

from shuteye import errors
from shuteye.client import (
    AsyncClient,
    AsyncWakingTransport,
    Client,
    ServerState,
    WakingCost,
    WakingTransport,
    error_from_response,
    waking,
)
from shuteye.state import EngineState, SchedulerStats, SleepReport, TagReport, TagState, UpdateReport, WakeReport

SLEEPING = {"error": {"message": errors.ModelSleeping.MESSAGE, "type": "ModelSleepingError", "code": 503}}
URL = "http://test:8000"


def error_body(message, kind, code, param=None):
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class FakeServer:
    """A model that sleeps until woken; counts what arrives. Thread-safe."""

    def __init__(self, *, wake_s=0.0, wake_answers=(), admin_key=None, naps=0, gather=1):
        self.awake = False
        self.wakes = 0
        self.served = 0
        self.refused = 0
        self.naps = naps
        self.wake_s = wake_s
        self.wake_answers = list(wake_answers)
        self.admin_key = admin_key
        self.lock = threading.Lock()
        self.gather = gather  # wake only once this many requests were refused, so that they really wait together

    def __call__(self, request):
        if request.url.path == "/wake_up":
            deadline = time.monotonic() + 10
            while self.refused < self.gather and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(self.wake_s)
            return self._wake(request)
        return self._serve(request)

    async def handle_async(self, request):
        if request.url.path == "/wake_up":
            while self.refused < self.gather:
                await asyncio.sleep(0.001)
            await asyncio.sleep(self.wake_s)
            return self._wake(request)
        await asyncio.sleep(0)
        return self._serve(request)

    def _wake(self, request):
        with self.lock:
            self.wakes += 1
            if self.admin_key and request.headers.get("authorization") != f"Bearer {self.admin_key}":
                return httpx2.Response(401, json=error_body("wrong key", "AuthenticationError", 401))
            if self.wake_answers:
                answer = self.wake_answers.pop(0)
                if isinstance(answer, Exception):
                    raise answer
                return answer
            if self.naps:
                self.naps -= 1  # woken, but asleep again before anyone gets through
            else:
                self.awake = True
            return httpx2.Response(200, json=asdict(WakeReport(changed=True)))

    def _serve(self, request):
        with self.lock:
            if not self.awake:
                self.refused += 1
                return httpx2.Response(503, json=SLEEPING, headers={"Retry-After": "0"})
            self.served += 1
            return httpx2.Response(200, json={"echo": request.content.decode()})


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch):
    monkeypatch.setattr(waking, "FIRST_BACKOFF_S", 0.001)


def sync_http(server, **options):
    return httpx2.Client(transport=WakingTransport(httpx2.MockTransport(server), **options), base_url=URL)


def async_http(server, **options):
    transport = AsyncWakingTransport(httpx2.MockTransport(server.handle_async), **options)
    return httpx2.AsyncClient(transport=transport, base_url=URL)


def post_concurrently(http, count):
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda i: http.post("/v1/completions", content=f"body {i}"), range(count)))


WAKE_FAILED = error_body("out of memory", "WakeFailedError", 503)


class TestWakingTransport:
    def test_fifty_threads_wake_the_model_once(self):
        """Catches a wake per request, lost requests, and answers that reach the wrong caller."""
        server = FakeServer(gather=50)
        with sync_http(server) as http:
            answers = post_concurrently(http, 50)
        assert [answer.json()["echo"] for answer in answers] == [f"body {i}" for i in range(50)]
        assert (server.wakes, server.served, server.refused) == (1, 50, 50)

    def test_fifty_threads_share_one_failed_wake_and_the_next_request_tries_again(self):
        """Catches a stampede of wakes after a failure, waiters left hanging, and a failure that sticks."""
        server = FakeServer(
            wake_answers=[httpx2.Response(503, json=WAKE_FAILED, headers={"Retry-After": "7"})], gather=50
        )
        with sync_http(server) as http:
            answers = post_concurrently(http, 50)
            assert {answer.status_code for answer in answers} == {503}
            assert all(answer.json() == WAKE_FAILED and answer.headers["retry-after"] == "7" for answer in answers)
            assert server.wakes == 1
            assert http.post("/v1/completions", content="next").json() == {"echo": "next"}
        assert server.wakes == 2

    def test_an_unreachable_wake_raises_for_everyone(self):
        """Catches waiters hanging when the connection of the wake breaks."""
        server = FakeServer(wake_answers=[httpx2.ConnectError("gone")], gather=8)

        def attempt(_):
            with pytest.raises(httpx2.ConnectError):
                http.post("/v1/completions", content="x")

        with sync_http(server) as http, ThreadPoolExecutor(8) as pool:
            list(pool.map(attempt, range(8)))
            assert server.wakes == 1
            assert http.post("/v1/completions", content="next").status_code == 200

    def test_an_interrupted_leader_hands_over(self):
        """Catches waiters that hang, or die of someone else's interrupt."""
        server = FakeServer(wake_answers=[RuntimeError("interrupted")], gather=8)
        with sync_http(server) as http, ThreadPoolExecutor(8) as pool:
            results = [pool.submit(http.post, "/v1/completions", content="x") for _ in range(8)]
            failures = [result.exception(timeout=20) for result in results]
        assert sum(failure is not None for failure in failures) == 1
        assert (server.wakes, server.served) == (2, 7)

    def test_asleep_again_before_the_retry_is_woken_again_but_not_for_ever(self):
        """Catches both giving up after one wake and an endless duel with whoever puts the model to sleep."""
        server = FakeServer(naps=waking.MAX_WAKES - 1)
        with sync_http(server) as http:
            assert http.post("/v1/completions", content="x").status_code == 200
        assert server.wakes == waking.MAX_WAKES
        server = FakeServer(naps=10**6)
        with sync_http(server) as http:
            answer = http.post("/v1/completions", content="x")
        assert (answer.status_code, answer.json()) == (503, SLEEPING)
        assert server.wakes == waking.MAX_WAKES

    def test_retry_after_is_honoured_but_bounded(self, monkeypatch):
        """Catches hammering a server that asks for patience, and sleeping for as long as it likes."""
        naps = []
        monkeypatch.setattr(waking.time, "sleep", naps.append)
        for header, allowed in (("5", True), ("31", False), ("soon", True)):
            naps.clear()
            calls = []

            def handler(request, header=header, calls=calls):
                calls.append(request.url.path)
                if request.url.path == "/wake_up":
                    return httpx2.Response(200, json={})
                return httpx2.Response(503, json=SLEEPING, headers={"Retry-After": header})

            with httpx2.Client(transport=WakingTransport(httpx2.MockTransport(handler)), base_url=URL) as http:
                assert http.post("/x", content="x").status_code == 503
            assert calls.count("/wake_up") == (3 if allowed else 1)
            assert naps == {"5": [0.0, 5.0, 5.0], "31": [0.0], "soon": [0.0, 0.001, 0.002]}[header]

    def test_retry_after_may_be_a_date(self):
        """Catches reading only one of the header's two forms."""
        later = format_datetime(datetime.now(UTC) + timedelta(seconds=20), usegmt=True)
        response = httpx2.Response(503, headers={"Retry-After": later})
        assert 17 < waking._retry_after_s(response) <= 20

    def test_other_failures_are_left_alone(self):
        """Catches waking for any 503, and eating the body of one."""
        full = error_body("queue full", "QueueFullError", 503)
        calls = []

        def handler(request):
            calls.append(request.url.path)
            return httpx2.Response(503, json=full)

        with httpx2.Client(transport=WakingTransport(httpx2.MockTransport(handler)), base_url=URL) as http:
            answer = http.post("/v1/completions", content="x")
            assert answer.json() == full
            assert answer.elapsed.total_seconds() >= 0
        assert calls == ["/v1/completions"]

    def test_a_body_that_cannot_be_sent_twice_is_not_retried(self):
        """Catches a retry with an empty body."""
        calls = []

        class Inner(httpx2.BaseTransport):  # MockTransport would read the stream into memory
            def handle_request(self, request):
                calls.append((request.url.path, b"".join(request.stream)))
                return httpx2.Response(503, json=SLEEPING)

        with httpx2.Client(transport=WakingTransport(Inner()), base_url=URL) as http:
            assert http.post("/x", content=iter([b"a", b"b"])).json() == SLEEPING
        assert calls == [("/x", b"ab")]

    def test_a_form_is_sent_again_whole(self):
        """Catches a recording that reaches a sleeping server being refused, or sent a second time without its file."""
        bodies = []

        class Inner(httpx2.BaseTransport):
            def handle_request(self, request):
                if request.url.path == "/wake_up":
                    return httpx2.Response(200, json={"changed": True})
                bodies.append(b"".join(request.stream))
                return httpx2.Response(503, json=SLEEPING) if len(bodies) == 1 else httpx2.Response(200, json={})

        with httpx2.Client(transport=WakingTransport(Inner()), base_url=URL) as http:
            files = {"file": ("speech.ogg", io.BytesIO(b"OggS" * 100))}
            assert http.post("/v1/audio/transcriptions", data={"model": "m"}, files=files).status_code == 200
        assert len(bodies) == 2
        assert bodies[0] == bodies[1]
        assert b"OggS" * 100 in bodies[0]

    def test_streams_pass_through_unread(self):
        """Catches a transport that buffers a stream before handing it on."""
        seen = []

        class Chunks(httpx2.SyncByteStream):
            def __iter__(self):
                for part in (b"one", b"two"):
                    seen.append(part)
                    yield part

        server = FakeServer()

        def handler(request):
            response = server(request)
            return (
                response
                if response.status_code != 200 or "wake" in str(request.url)
                else httpx2.Response(200, stream=Chunks())
            )

        with sync_http(handler) as http, http.stream("POST", "/v1/completions", content="x") as response:
            assert seen == []
            assert next(response.iter_raw()) == b"one"
            assert seen == [b"one"]

    def test_a_wrong_admin_key_is_told_and_not_retried_by_openai(self):
        """Catches an unexplained 503, and the openai client's retries each waking again."""
        server = FakeServer(admin_key="right")
        with sync_http(server, admin_api_key="wrong") as http:
            client = openai.OpenAI(http_client=http, base_url=f"{URL}/v1", api_key="k")
            with pytest.raises(openai.APIStatusError, match=r"refused to wake it \(401: wrong key\)") as caught:
                client.completions.create(model="m", prompt="x")
        assert caught.value.status_code == 503
        assert server.wakes == 1

    def test_openai_client_is_served_across_a_sleep(self):
        """Catches the transport not fitting the openai client, and the inference key used for the wake."""
        server = FakeServer(admin_key="admin")
        with sync_http(server, admin_api_key="admin") as http:
            client = openai.OpenAI(http_client=http, base_url=f"{URL}/v1", api_key="inference", max_retries=0)
            assert "hello" in client.completions.with_raw_response.create(model="m", prompt="hello").text
        assert server.wakes == 1

    def test_each_server_is_woken_for_itself(self):
        """Catches one server's wake taken for another's."""
        woken = set()

        def handler(request):
            if request.url.path == "/wake_up":
                woken.add(request.url.host)
                return httpx2.Response(200, json={})
            return httpx2.Response(200) if request.url.host in woken else httpx2.Response(503, json=SLEEPING)

        with httpx2.Client(transport=WakingTransport(httpx2.MockTransport(handler))) as http:
            assert [http.get(f"http://{host}/v1/x?q=1").status_code for host in ("a", "b", "a")] == [200] * 3
        assert woken == {"a", "b"}


class TestAsyncWakingTransport:
    def test_fifty_tasks_wake_the_model_once(self):
        """Catches a wake per task."""
        server = FakeServer(gather=50)

        async def main():
            async with async_http(server) as http:
                return await asyncio.gather(*(http.post("/v1/completions", content=f"body {i}") for i in range(50)))

        answers = asyncio.run(main())
        assert [answer.json()["echo"] for answer in answers] == [f"body {i}" for i in range(50)]
        assert (server.wakes, server.served) == (1, 50)

    def test_fifty_tasks_share_one_failed_wake_and_the_next_request_tries_again(self):
        """Catches a stampede after a failure and a failure that sticks."""
        server = FakeServer(wake_answers=[httpx2.Response(503, json=WAKE_FAILED)], gather=50)

        async def main():
            async with async_http(server) as http:
                answers = await asyncio.gather(*(http.post("/v1/completions", content="x") for _ in range(50)))
                assert [answer.json() for answer in answers] == [WAKE_FAILED] * 50
                assert server.wakes == 1
                assert (await http.post("/v1/completions", content="next")).status_code == 200

        asyncio.run(main())
        assert server.wakes == 2

    def test_cancelling_the_leader_does_not_strand_the_others(self):
        """Catches waiters that hang for ever, or are cancelled with the task that happened to be waking."""
        server = FakeServer(wake_s=0.2, gather=5)

        async def main():
            async with async_http(server) as http:
                tasks = [asyncio.create_task(http.post("/v1/completions", content="x")) for _ in range(5)]
                while server.refused < 5:
                    await asyncio.sleep(0.001)
                tasks[0].cancel()
                return await asyncio.gather(*tasks, return_exceptions=True)

        first, *others = asyncio.run(main())
        assert isinstance(first, asyncio.CancelledError)
        assert [answer.status_code for answer in others] == [200] * 4
        assert server.wakes == 1  # the cancelled one never reached the model

    def test_asleep_again_is_bounded(self):
        """Catches an endless loop in the async twin."""
        server = FakeServer(naps=10**6)

        async def main():
            async with async_http(server) as http:
                return await http.post("/v1/completions", content="x")

        assert asyncio.run(main()).json() == SLEEPING
        assert server.wakes == waking.MAX_WAKES


SLEEP_REPORT = SleepReport(
    changed=True,
    level=1,
    tags=(TagReport(tag="weights", residency="offloaded", backing="image", freed_bytes=7, seconds=0.5),),
    freed_bytes=7,
    seconds=1.0,
)
STATE = ServerState(
    status="ready",
    failure=None,
    models=("m",),
    is_sleeping=True,
    is_paused=False,
    ready=False,
    state=EngineState(gate="closed", level=1, tags=(TagState("weights", "offloaded", "image", 10, 0),)),
    waking=WakingCost(10, {"weights": 10}, {"weights": "image"}, 0.5),
    model=None,
    stats=SchedulerStats(num_running=3),
)


def recording(answers):
    """A handler that answers by path, and the list of what it was asked."""
    asked = []

    def handler(request):
        asked.append((request.method, request.url.raw_path.decode(), request.headers.get("authorization")))
        if request.url.path == "/reload_weights":
            assert json.loads(request.content) == {"path": "/data"}
        return answers[request.url.path]

    return handler, asked


def answered(report):
    """As a server answers it: what was asked for under `tags`, what was measured under `tag_reports`."""
    measured = asdict(report)
    return {"status": "sleeping", "tags": ["weights"], "tag_reports": measured.pop("tags"), **measured}


def control_answers():
    return {
        "/sleep": httpx2.Response(200, json={**answered(SLEEP_REPORT), "field_of_a_newer_server": 1}),
        "/wake_up": httpx2.Response(200, json=answered(WakeReport(changed=True, missing=("a",)))),
        "/is_sleeping": httpx2.Response(200, json={"is_sleeping": True}),
        "/is_paused": httpx2.Response(200, json={"is_paused": False}),
        "/pause": httpx2.Response(200, json={}),
        "/resume": httpx2.Response(200, json={}),
        "/reload_weights": httpx2.Response(200, json=asdict(UpdateReport(updated=3, updated_bytes=9))),
        "/reset_prefix_cache": httpx2.Response(200),
        "/state": httpx2.Response(200, json=asdict(STATE)),
        "/health": httpx2.Response(503),
        "/ready": httpx2.Response(503, json={"ready": False, "reason": "sleeping"}),
        "/version": httpx2.Response(200, json={"version": "1.2"}),
    }


EXPECTED_CALLS = [
    ("POST", "/sleep?level=2&mode=wait&tags=weights&tags=kv_cache&timeout=1.5"),
    ("POST", "/wake_up?tags="),
    ("GET", "/is_sleeping"),
    ("GET", "/is_paused"),
    ("POST", "/pause?mode=keep"),
    ("POST", "/resume"),
    ("POST", "/reload_weights"),
    ("POST", "/reset_prefix_cache"),
    ("GET", "/state"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/version"),
]
EXPECTED_RESULTS = [
    SLEEP_REPORT,
    WakeReport(changed=True, missing=("a",)),
    True,
    False,
    None,
    None,
    UpdateReport(updated=3, updated_bytes=9),
    None,
    STATE,
    False,
    False,
    "1.2",
]


def every_call(client):
    return [
        lambda: client.sleep(2, mode="wait", tags=["weights", "kv_cache"], drain_timeout_s=1.5),
        lambda: client.wake_up([]),
        client.is_sleeping,
        client.is_paused,
        lambda: client.pause("keep"),
        client.resume,
        lambda: client.reload_weights("/data"),
        client.reset_prefix_cache,
        client.state,
        client.health,
        client.ready,
        client.version,
    ]


def test_every_call_sends_what_the_contract_says_and_reads_the_answer():
    """Catches a wrong route, method, parameter or key, and an answer read into the wrong shape."""
    handler, asked = recording(control_answers())
    with Client(URL + "/", admin_api_key="key", transport=httpx2.MockTransport(handler)) as client:
        results = [call() for call in every_call(client)]
    assert results == EXPECTED_RESULTS
    assert asked == [(method, path, "Bearer key") for method, path in EXPECTED_CALLS]


def test_the_async_client_is_the_same_client():
    """Catches the twin drifting."""
    handler, asked = recording(control_answers())

    async def main():
        async with AsyncClient(URL, transport=httpx2.MockTransport(handler)) as client:
            return [await call() for call in every_call(client)]

    assert asyncio.run(main()) == EXPECTED_RESULTS
    assert asked == [(method, path, None) for method, path in EXPECTED_CALLS]


def concrete_errors():
    return [
        kind for name, kind in errors._BY_NAME.items() if name not in {"ShuteyeError", "ClientError", "ServerError"}
    ]


@pytest.mark.parametrize("kind", concrete_errors(), ids=lambda kind: kind.__name__)
def test_every_error_comes_back_as_itself_or_as_what_its_type_promises(kind):
    """Catches an error class whose type the client does not know, or knows as an unrelated class."""
    body = json.dumps(error_body("seen, expected, do", kind.error_type, kind.status_code, "field")).encode()
    error = error_from_response(kind.status_code, body)
    shared = {errors.PromptTooLong: errors.InvalidRequest, errors.UnsupportedModel: errors.InvalidRequest}
    shared |= dict.fromkeys((errors.SleepModeDisabled, errors.ResponseNotFound), errors.ModelNotFound)
    assert type(error) is shared.get(kind, kind)
    assert (error.message, error.param) == ("seen, expected, do", "field")


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, errors.InvalidRequest), (418, errors.ClientError), (502, errors.ServerError), (500, errors.InternalError)],
)
@pytest.mark.parametrize("body", [b"<html>", b"", b"[]", b'{"error": "text"}', b'{"error": {"type": 7}}', b"\xff"])
def test_answers_that_are_not_ours_go_by_status(status, kind, body):
    """Catches a proxy's error page crashing the client."""
    error = error_from_response(status, body)
    assert type(error) is kind
    assert str(status) in error.message


def test_a_missing_control_route_says_how_to_get_it():
    """Catches a bare 404 for the commonest mistake."""
    not_found = httpx2.Response(404, json=error_body("No route POST /sleep.", "NotFoundError", 404))
    client = Client(URL, transport=httpx2.MockTransport(lambda _: not_found))
    with client, pytest.raises(errors.SleepModeDisabled, match="--enable-sleep-mode"):
        client.sleep()


def test_refused_transitions_and_answers_of_other_servers_are_errors():
    """Catches a refused transition read as a report, and someone else's server taken for ours."""
    answers = {
        "/sleep": httpx2.Response(409, json=error_body("asleep at 2", "ConflictError", 409)),
        "/wake_up": httpx2.Response(200, content=b"hello"),
        "/version": httpx2.Response(200, json=["no"]),
    }
    with Client(URL, transport=httpx2.MockTransport(recording(answers)[0])) as client:
        with pytest.raises(errors.TransitionConflict, match="asleep at 2"):
            client.sleep()
        with pytest.raises(errors.InternalError, match="not a shuteye server"):
            client.wake_up()
        with pytest.raises(errors.InternalError, match="not a shuteye server"):
            client.version()


def test_no_server_and_no_answer_in_time_are_errors():
    """Catches a foreign exception leaking out of the client."""
    with Client("http://127.0.0.1:1") as client, pytest.raises(errors.ServerUnreachable, match="Is the server running"):
        client.is_sleeping()

    def slow(_request):
        raise httpx2.ReadTimeout("slow")

    client = Client(URL, transport=httpx2.MockTransport(slow))
    with client, pytest.raises(errors.ServerUnreachable, match="in time"):
        client.sleep()


@pytest.mark.parametrize("key", ["topsecret\n", "top\nsecret", " topsecret", "topsecret\0", " ", ""])
@pytest.mark.parametrize("kind", [Client, AsyncClient, WakingTransport, AsyncWakingTransport])
def test_a_key_that_no_header_can_carry_is_refused_and_never_shown(kind, key):
    """Catches a key from a file with its last line break that ends up in a terminal, or in a log of errors."""
    with pytest.raises(errors.InvalidRequest) as refused:
        kind(admin_api_key=key)
    assert refused.value.param == "admin_api_key"
    assert "secret" not in repr(refused.value)


def test_a_waking_transport_sends_any_letters():
    """Catches a wake that fails because the key is not ASCII, which the server accepts."""
    with sync_http(FakeServer(admin_key="schlüssel"), admin_api_key="schlüssel") as http:
        assert http.post(f"{URL}/v1/completions", json={}).status_code == 200
    assert "schlüssel" not in repr(WakingTransport(admin_api_key="schlüssel")._wake)


# --- redirects ------------------------------------------------------------------------------------


class Redirecting:
    """A server that sends everyone on to another origin, where a model "sleeps"; who was asked, and with which key."""

    def __init__(self, to):
        self.to = to
        self.asked = []

    def __call__(self, request):
        self.asked.append((request.url.host, request.url.path, request.headers.get("authorization")))
        if request.url.host == "test":
            return httpx2.Response(307, headers={"Location": f"{self.to}{request.url.path}"})
        if request.url.path == "/wake_up":
            return httpx2.Response(200, json=asdict(WakeReport(changed=True)))
        return httpx2.Response(503, json=SLEEPING, headers={"Retry-After": "0"})

    async def handle_async(self, request):
        return self(request)

    @property
    def strangers_got(self):
        """What other hosts than the caller's were asked for, and with which key."""
        return [(path, key) for host, path, key in self.asked if host != "test"]


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_the_admin_key_does_not_follow_a_redirect_to_another_origin(kind):
    """Catches whoever can make a server redirect being handed the admin key, by claiming that a model sleeps."""
    server = Redirecting("http://evil.example")

    async def ask():
        async with async_http(server, admin_api_key="sk-admin") as http:
            return await http.post("/v1/completions", content="x", follow_redirects=True)

    if kind == "sync":
        with sync_http(server, admin_api_key="sk-admin") as http:
            answer = http.post("/v1/completions", content="x", follow_redirects=True)
    else:
        answer = asyncio.run(ask())
    assert server.strangers_got == [("/v1/completions", None)]
    found = answer.json()["error"]
    assert (answer.status_code, found["type"]) == (503, "WakeFailedError")
    assert "http://evil.example" in found["message"]


def test_a_redirect_within_the_origin_is_woken():
    """Catches a pin that is too tight: a proxy that moves paths about."""
    server = FakeServer(admin_key="sk-admin")

    def moved(request):
        if request.url.path == "/old":
            return httpx2.Response(307, headers={"Location": "/v1/completions"})
        return server(request)

    with httpx2.Client(
        transport=WakingTransport(httpx2.MockTransport(moved), admin_api_key="sk-admin"), base_url=URL
    ) as http:
        assert http.post("/old", content="x", follow_redirects=True).json() == {"echo": "x"}
    assert server.wakes == 1


def test_control_calls_follow_no_redirect():
    """Catches the admin key sent on, and a redirect read as a report or as a bare status."""
    server = Redirecting("https://test.example")
    with (
        Client(URL, admin_api_key="sk-admin", transport=httpx2.MockTransport(server)) as client,
        pytest.raises(errors.ServerUnreachable, match=r"https://test\.example/sleep"),
    ):
        client.sleep()

    async def main():
        transport = httpx2.MockTransport(server.handle_async)
        async with AsyncClient(URL, admin_api_key="sk-admin", transport=transport) as client:
            await client.sleep()

    with pytest.raises(errors.ServerUnreachable, match=r"https://test\.example/sleep"):
        asyncio.run(main())
    assert server.strangers_got == []
