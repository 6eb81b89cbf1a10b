"""Two replicas with fake engines behind one control: over HTTP they are one server, whichever of them is asked."""

import asyncio
from contextlib import asynccontextmanager

import httpx2
import pytest
from fake_engine import FakeEngine

from shuteye.calls import SleepCall
from shuteye.config import EngineConfig
from shuteye.errors import EngineDead, EngineNotReady, SleepFailed
from shuteye.ray import control as control_module
from shuteye.ray.control import SleepControl
from shuteye.ray.idle import Work
from shuteye.ray.replica import Replica
from shuteye.ray.settings import ReplicaSettings
from shuteye.server.config import ServerConfig

PROMPT = {"model": "m", "prompt": "hello", "max_tokens": 4}


class BrokenSleep(FakeEngine):
    """Has no room to sleep."""

    async def _sleep(self, call):
        raise SleepFailed("no room on this disk")


class Recording(FakeEngine):
    """Remembers how often it was told to sleep."""

    num_sleeps = 0

    async def control(self, call):
        self.num_sleeps += isinstance(call, SleepCall)
        return await super().control(call)


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch):
    monkeypatch.setattr(control_module, "POLL_S", 0.05)
    monkeypatch.setattr(control_module, "LOOK_S", 0.05)


def settings_with(*, policy="reject", **more):
    engine = EngineConfig(model="m", enable_sleep_mode=True, on_sleeping_request=policy)
    return ReplicaSettings(engine, ServerConfig(dev_mode=True), **more)


@asynccontextmanager
async def served(*kinds, **more):
    """Replicas with such engines, named a, b, …; yields (control, engines, clients, replicas)."""
    settings, control = settings_with(**more), SleepControl()
    engines = [kind(config=settings.engine) for kind in kinds]
    replicas = [Replica("abc"[i], settings, engine, control) for i, engine in enumerate(engines)]
    clients = []
    try:
        async with asyncio.timeout(15):
            for replica in replicas:
                await replica.start()
                transport = httpx2.ASGITransport(app=replica.app)
                clients.append(httpx2.AsyncClient(transport=transport, base_url="http://localhost"))
            yield control, engines, clients, replicas
    finally:
        for client in clients:
            await client.aclose()
        for replica in replicas:
            await replica.stop()


def test_whichever_replica_is_asked_all_of_them_sleep_and_wake():
    async def scenario():
        async with served(FakeEngine, FakeEngine) as (_, engines, (one, other), _replicas):
            answer = (await one.post("/sleep?level=2")).json()
            assert [engine.is_sleeping for engine in engines] == [True, True]
            assert (answer["status"], answer["level"]) == ("sleeping", 2)
            assert answer["freed_bytes"] == sum(each["report"]["freed_bytes"] for each in answer["replicas"]) > 0
            assert [each["replica"] for each in answer["replicas"]] == ["a", "b"]
            assert (await other.get("/is_sleeping")).json() == {
                "is_sleeping": True, "sleeping": ["a", "b"], "replicas": ["a", "b"], "failed": [],
            }  # fmt: skip
            refused = await other.post("/v1/completions", json=PROMPT)
            assert (refused.status_code, refused.json()["error"]["type"]) == (503, "ModelSleepingError")
            woken = (await other.post("/wake_up")).json()
            assert (woken["status"], woken["changed"]) == ("awake", True)
            assert [engine.is_sleeping for engine in engines] == [False, False]
            assert (await one.post("/v1/completions", json=PROMPT)).status_code == 200

    asyncio.run(scenario())


def test_pause_resume_and_prefix_cache_reach_all():
    async def scenario():
        async with served(FakeEngine, FakeEngine) as (_, engines, (one, other), _replicas):
            assert (await one.post("/pause?mode=wait&clear_cache=true")).status_code == 200
            assert [(engine.is_paused, engine.prefix_resets) for engine in engines] == [(True, 1)] * 2
            assert (await other.get("/is_paused")).json()["paused"] == ["a", "b"]
            assert (await other.post("/resume")).json()["status"] == "resumed"
            assert [engine.is_paused for engine in engines] == [False, False]

    asyncio.run(scenario())


def test_a_failing_replica_is_named_in_an_answer_that_is_no_200():
    async def scenario():
        async with served(FakeEngine, BrokenSleep) as (_, engines, (one, _other), _replicas):
            answer = await one.post("/sleep")
            assert answer.status_code == 503
            body = answer.json()
            assert body["error"]["type"] == "ReplicasFailedError"
            assert "replica b: SleepFailed: no room on this disk" in body["error"]["message"]
            good, bad = body["replicas"]
            assert good["report"]["changed"]
            assert good["error"] is None
            assert bad["error"]["kind"] == "SleepFailed"
            assert [engine.is_sleeping for engine in engines] == [True, False]

    asyncio.run(scenario())


def test_what_all_refuse_is_answered_as_by_a_single_server():
    async def scenario():
        async with served(FakeEngine, FakeEngine) as (_, _engines, (one, other), _replicas):
            await one.post("/sleep?level=2")
            conflict = await other.post("/sleep?level=1")
            assert (conflict.status_code, conflict.json()["error"]["type"]) == (409, "ConflictError")
            wrong = await other.post("/sleep?level=9")
            assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "query.level")

    asyncio.run(scenario())


def test_the_state_is_of_all_and_of_each():
    async def scenario():
        async with served(FakeEngine, FakeEngine) as (control, engines, (one, _other), _replicas):
            await engines[1].sleep()  # as for want of requests
            state = (await one.get("/state")).json()
            assert {name: each["is_sleeping"] for name, each in state["replicas"].items()} == {"a": False, "b": True}
            assert (state["is_sleeping"], state["ready"], state["wanted"]["asleep"]) == (True, True, [])
            assert state == await control.state()

    asyncio.run(scenario())


@pytest.mark.parametrize("path", ["/update_weights", "/reload_weights", "/collective_rpc", "/restart_engine"])
def test_what_would_act_on_one_replica_is_refused(path):
    """A request that updates the weights of whichever replica Ray Serve chose."""

    async def scenario():
        async with served(FakeEngine) as (_, engines, (one,), _replicas):
            answer = await one.post(path, json={"path": "x"})
            assert answer.status_code == 400
            assert path in answer.json()["error"]["message"]
            assert (engines[0].updated, engines[0].reloaded) == ([], [])

    asyncio.run(scenario())


def test_control_routes_need_the_key_that_they_need_elsewhere():
    async def scenario():
        settings = ReplicaSettings(settings_with().engine, ServerConfig(api_key="k", admin_api_key="secret"))
        replica = Replica("a", settings, FakeEngine(config=settings.engine), SleepControl())
        await replica.start()
        transport = httpx2.ASGITransport(app=replica.app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            key = {"Authorization": "Bearer secret"}
            for path in ("/sleep", "/wake_up", "/restart_engine", "/update_weights"):
                assert (await client.post(path)).status_code == 401, path
            assert (await client.get("/state")).status_code == 401
            assert (await client.post("/sleep", headers=key)).status_code == 200
        await replica.stop()

    asyncio.run(scenario())


def test_what_nobody_can_say_is_no_answer(monkeypatch):
    """`is_sleeping: false`, because no replica was there to say otherwise."""
    monkeypatch.setattr(control_module, "LOOK_TIMEOUT_S", 0.2)

    async def scenario():
        async with served(FakeEngine) as (control, _engines, (one,), _replicas):
            monkeypatch.setattr(control, "_members", {})
            monkeypatch.setattr(control, "join", lambda *_: asyncio.Event().wait())
            for path in ("/is_sleeping", "/is_paused"):
                answer = await one.get(path)
                assert (answer.status_code, answer.json()["error"]["type"]) == (503, "EngineNotReadyError")
            with pytest.raises(EngineNotReady, match="No replica answers"):
                await control.is_sleeping()
            assert (await one.get("/state")).json()["replicas"] == {}

    asyncio.run(scenario())


def test_the_request_id_is_left_to_the_proxy():
    async def scenario():
        async with served(FakeEngine) as (_, _engines, (one,), _replicas):
            assert "x-request-id" not in (await one.get("/ping")).headers

    asyncio.run(scenario())


# --- scale to zero ------------------------------------------------------------------------------


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


def test_an_idle_replica_sleeps_and_the_next_request_wakes_it():
    async def scenario():
        async with served(FakeEngine, FakeEngine, policy="wake", idle_sleep_s=0.3) as (_, engines, (one, _other), _):
            await until(lambda: all(engine.is_sleeping for engine in engines))
            assert (await one.post("/v1/completions", json=PROMPT)).status_code == 200
            assert [engine.is_sleeping for engine in engines] == [False, True], "only the one that was asked wakes"
            await until(lambda: engines[0].is_sleeping)

    asyncio.run(scenario())


def test_a_request_that_runs_longer_than_the_idle_time_is_work():
    async def scenario():
        async with served(Recording, policy="wake", idle_sleep_s=0.2) as (_, engines, (one,), _replicas):
            engines[0].token_delay_s = 0.2
            asking = asyncio.create_task(one.post("/v1/completions", json=PROMPT))
            await until(lambda: engines[0].running)
            while not asking.done():
                assert engines[0].num_sleeps == 0, "others would have to wait until it is over"
                await asyncio.sleep(0.02)
            assert (await asking).status_code == 200
            await until(lambda: engines[0].is_sleeping)

    asyncio.run(scenario())


def test_idle_time_begins_with_the_end_of_the_last_request(monkeypatch):
    """A replica that sleeps between any two requests."""
    now = [0.0]
    monkeypatch.setattr("shuteye.ray.idle.time.monotonic", lambda: now[0])
    work, seen = Work(), []
    steps = (None, work.begin, work.begin, work.end, work.end, None, work.note)
    for step in steps:
        now[0] += 10
        if step is not None:
            step()
        seen.append(work.idle_s)
    assert seen == [10, 0, 0, 0, 0, 10, 0]
    now[0] += 5
    assert work.idle_s == 5


def test_questions_are_no_work():
    """A replica that health checks, scrapers and looks keep awake."""

    async def scenario():
        async with served(FakeEngine, policy="wake", idle_sleep_s=0.3) as (_, engines, (one,), _replicas):
            async with asyncio.timeout(5):
                while not engines[0].is_sleeping:
                    for path in ("/health", "/metrics", "/state", "/v1/models"):
                        await one.get(path)
                    await one.post("/reset_prefix_cache")

    asyncio.run(scenario())


def test_a_wake_by_hand_begins_the_idle_time_anew():
    async def scenario():
        async with served(FakeEngine, policy="wake", idle_sleep_s=0.6) as (control, engines, _clients, _replicas):
            await until(lambda: engines[0].is_sleeping)
            await control.wake_up()
            await asyncio.sleep(0.3)
            assert not engines[0].is_sleeping
            await until(lambda: engines[0].is_sleeping)

    asyncio.run(scenario())


# --- life ---------------------------------------------------------------------------------------


def test_a_replica_comes_up_asleep_if_that_is_wanted():
    async def scenario():
        settings, control = settings_with(), SleepControl()
        first = Replica("a", settings, FakeEngine(config=settings.engine), control)
        await first.start()
        await control.sleep(level=2)
        engine = FakeEngine(config=settings.engine)
        second = Replica("b", settings, engine, control)
        await second.start()
        assert engine.is_sleeping
        assert (await control.look()).sleeping == ("a", "b")
        await first.stop()
        await second.stop()
        assert engine.status == "closed"

    asyncio.run(scenario())


def test_a_model_that_does_not_load_fails_the_start_with_its_own_error():
    async def scenario():
        settings = settings_with()
        engine = FakeEngine(config=settings.engine, start_error=EngineDead("no such file"))
        with pytest.raises(EngineDead, match="no such file"):
            await Replica("a", settings, engine, SleepControl()).start()
        assert engine.status == "closed"

    asyncio.run(scenario())


def test_whoever_serves_the_app_neither_starts_nor_ends_its_engine():
    """Ray Serve runs the application's lifespan after the replica has loaded."""

    async def scenario():
        async with served(FakeEngine) as (_, engines, _clients, (replica,)):
            async with replica.app.router.lifespan_context(replica.app):
                pass
            assert engines[0].status == "ready"

    asyncio.run(scenario())


def test_a_dead_engine_fails_the_health_check_and_a_sleeping_one_does_not():
    async def scenario():
        async with served(FakeEngine) as (control, engines, _clients, (replica,)):
            replica.check()
            await control.sleep()
            replica.check()
            await engines[0].die()
            with pytest.raises(EngineDead, match="signal 9"):
                replica.check()

    asyncio.run(scenario())
