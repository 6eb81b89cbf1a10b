"""GET /v1/fleet, and leases of memory over HTTP, with models that only count."""

import time

import pytest
from counted_model import CountedModel
from fake_engine import FakeEngine
from fastapi.testclient import TestClient

from shuteye.config import EngineConfig
from shuteye.fleet.events import WakeAsked
from shuteye.fleet.model_spec import ModelSpec
from shuteye.fleet.scheduler import Scheduler
from shuteye.fleet.settings import FleetSettings
from shuteye.frontend.fleet_driver import FleetDriver
from shuteye.server.app import create_app
from shuteye.server.config import ServerConfig

MIB = 1 << 20
BUDGET = 100 * MIB


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def client():
    driver = FleetDriver(Scheduler(BUDGET, FleetSettings(min_awake_s=0.0)))
    driver.add(ModelSpec(name="a", awake_bytes=60 * MIB, level_1_bytes=0), CountedModel(60 * MIB))
    engine = FakeEngine(EngineConfig(model="a", enable_sleep_mode=True))
    app = create_app(engine, ServerConfig(api_key="sk", admin_api_key="admin"), fleet=driver)
    headers = {"Authorization": "Bearer admin"}
    with TestClient(app, "http://localhost", headers=headers, raise_server_exceptions=False) as client:

        def on_loop(call, *args):
            async def run():
                return call(*args)

            return client.portal.call(run)

        client.wake = lambda: on_loop(driver.tell, WakeAsked("a", "operator", time.monotonic() + 10))
        client.driver = driver
        yield client
        on_loop(driver.close)


def claim(client, mib, **more):
    return client.post(
        "/v1/leases", json={"bytes": mib * MIB, "within_s": 5.0, "ttl_s": 60.0, "holder": "trainer"} | more
    )


def awake(client):
    client.wake()
    until(lambda: client.get("/v1/fleet").json()["models"][0]["phase"] == "awake")


def test_the_fleet_tells_its_budget_and_where_each_model_is(client):
    """Would catch an account that is not what the scheduler counts with, and a look that wakes."""
    found = client.get("/v1/fleet").json()
    assert (found["budget_bytes"], found["charged_bytes"]) == (BUDGET, 0)
    assert [(model["model"], model["depth"]) for model in found["models"]] == [("a", "unloaded")]
    awake(client)
    found = client.get("/v1/fleet").json()
    assert (found["charged_bytes"], found["models"][0]["depth"]) == (60 * MIB, "awake")


def test_a_lease_puts_models_to_sleep_and_its_end_wakes_them(client):
    """Would catch memory that is lent and not free, and models that nobody wakes again."""
    awake(client)
    granted = claim(client, 80)
    assert granted.status_code == 201, granted.text
    lease = granted.json()
    assert (lease["slept"], lease["freed_bytes"]) == (["a"], 60 * MIB)
    assert 0 < lease["expires_in_s"] <= 60
    (held,) = client.get("/v1/leases").json()["leases"]
    assert (held["id"], held["holder"], held["bytes"]) == (lease["id"], "trainer", 80 * MIB)
    assert client.get("/v1/fleet").json()["leased_bytes"] == 80 * MIB
    assert client.delete(f"/v1/leases/{lease['id']}").json() == {"status": "released"}
    until(lambda: client.get("/v1/fleet").json()["models"][0]["phase"] == "awake")
    assert client.get("/v1/fleet").json()["leased_bytes"] == 0


def test_two_claims_never_lend_the_same_bytes(client):
    """Would catch the over-commitment of others, who look before either takes."""
    assert claim(client, 70).status_code == 201
    refused = claim(client, 70, within_s=0.05)
    assert refused.status_code == 409
    answer = refused.json()
    assert answer["error"]["type"] == "LeaseRefusedError"
    assert answer["available_bytes"] == 30 * MIB
    assert [one["why"] for one in answer["in_the_way"]] == ["lease"]


def test_a_lease_that_is_over_stays_over(client):
    """Would catch a renewal that lends what others have by now."""
    lease = claim(client, 10, ttl_s=0.05).json()
    until(lambda: not client.get("/v1/leases").json()["leases"])
    for gone in (client.put(f"/v1/leases/{lease['id']}", json={"ttl_s": 60.0}), client.delete("/v1/leases/x")):
        assert (gone.status_code, gone.json()["error"]["type"]) == (410, "LeaseGoneError")
    lease = claim(client, 10, ttl_s=0.5).json()
    renewed = client.put(f"/v1/leases/{lease['id']}", json={"ttl_s": 60.0}).json()
    assert renewed["expires_in_s"] > 50


def test_a_dry_run_changes_nothing(client):
    """Would catch an estimate that puts models to sleep."""
    awake(client)
    tried = claim(client, 80, dry_run=True)
    assert (tried.status_code, tried.json()["id"], tried.json()["slept"]) == (200, None, ["a"])
    assert client.get("/v1/fleet").json()["models"][0]["phase"] == "awake"
    assert client.get("/v1/leases").json() == {"leases": []}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"bytes": 0}, "bytes"),
        ({"bytes": "6GiB"}, "bytes"),
        ({"bytes": 1, "within_s": -1}, "within_s"),
        ({"bytes": 1, "ttl_s": 1e12}, "ttl_s"),
        ({"bytes": 1, "may_sleep": ["b"]}, None),
        ({"bytes": 1, "nonsense": 1}, "nonsense"),
        ({}, "bytes"),
    ],
)
def test_what_cannot_be_is_refused_by_name(client, body, param):
    """Would catch 500, and a lease for ever."""
    refused = client.post("/v1/leases", json=body)
    assert refused.status_code in (400, 404), refused.text
    if param is not None:
        assert refused.json()["error"]["param"] == param
    assert client.get("/v1/leases").json() == {"leases": []}


def test_only_the_admin_key_takes_memory_away(client):
    """Would catch a caller of the model who can put it to sleep."""
    inference = {"Authorization": "Bearer sk"}
    assert client.post("/v1/leases", json={"bytes": 1}, headers=inference).status_code == 403
    assert client.get("/v1/fleet", headers=inference).status_code == 200
    assert client.get("/v1/fleet", headers={"Authorization": "Bearer no"}).status_code == 401
