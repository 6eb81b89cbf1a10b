"""Every route of the app while the model sleeps: one table (`route_table.py`), every policy, streamed and not."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.routing import iter_route_contexts
from route_table import CONTROL, OTHERS, PROTECTED, ROUTES, Row

SLEEPING = (
    b'{"error": {"message": "Model is currently in sleep mode. Please wake it up first with a POST request to '
    b'/wake_up", "type": "ModelSleepingError", "code": 503}}'
)
"""Written out as in the contract, not taken from the code that is tested."""

LEVELS = [1, 2]


def variants() -> Iterator[Any]:
    """Every protected route, not streamed, and streamed where it can be."""
    for row in PROTECTED:
        yield pytest.param(row, id=row.name)
        if row.streamed is not None:
            yield pytest.param(dataclasses.replace(row, request=row.streamed), id=f"{row.name} streamed")


each_protected = pytest.mark.parametrize("row", list(variants()))


def send(client: Any, row: Row) -> Any:
    return client.request(row.method, row.url or row.path, **row.request)


def is_stream(row: Row) -> bool:
    return row.request == row.streamed


def engine_for(make_engine: Any, row: Row, **options: Any) -> Any:
    return make_engine(task=row.task or "generate", **options)


def require_served(response: Any, row: Row) -> None:
    """The answer of a model that is awake, whole."""
    assert response.status_code == 200, response.text
    if is_stream(row):
        assert response.headers["content-type"].startswith("text/event-stream")
        assert row.stream_end in response.content.rstrip().rpartition(b"\n\n")[2]
        assert b'"error":{' not in response.content
    else:
        assert not response.json().get("error")


def require_refused(response: Any, row: Row) -> None:
    """The contract's 503, to the byte; in another shape, with the same message."""
    if row.shape == "anthropic":
        wanted = {"type": "overloaded_error", "message": json.loads(SLEEPING)["error"]["message"]}
        assert (response.status_code, response.json()["type"], response.json()["error"]) == (503, "error", wanted)
    else:
        assert (response.status_code, response.content) == (503, SLEEPING)
    assert response.headers["content-type"] == "application/json"
    assert int(response.headers["retry-after"]) >= 1


def test_every_route_of_the_app_has_a_row(client):
    """A new route that nobody thought about while the model sleeps; a row for a route that is gone."""
    served = {
        (method, route.path)
        for route in iter_route_contexts(client.app.routes)
        for method in route.methods or ()
        if method != "HEAD"
    }
    assert served == {(row.method, row.path) for row in ROUTES}
    assert len(ROUTES) == len(served), "a route has two rows"


def test_protected_routes_are_those_that_the_gate_guards(client):
    """A route moved behind the gate, or out of it, while its row stays."""
    from shuteye.server.http.admission import ModelRoute
    from shuteye.server.http.auth import ControlRoute

    kinds = {ModelRoute: "protected", ControlRoute: "control"}
    expected = {(row.method, row.path): row.kind for row in ROUTES}
    for route in iter_route_contexts(client.app.routes):
        for method in (route.methods or set()) - {"HEAD"}:
            kind = next((kind for base, kind in kinds.items() if isinstance(route.original_route, base)), None)
            assert (kind is None) == (expected[method, route.path] in {"unchanged", "tells"}), route.path
            assert kind in {None, expected[method, route.path]}, route.path


@each_protected
def test_awake_it_serves(make_engine, client_of, row):
    """A row whose request is wrong, so that the tests below prove nothing."""
    require_served(send(client_of(engine_for(make_engine, row)), row), row)


@each_protected
def test_reject_answers_the_503_to_the_byte(make_engine, client_of, row):
    """Another key, another message, a stream that begins before its refusal, or a request that reached the engine."""
    engine = engine_for(make_engine, row, on_sleeping_request="reject")
    client = client_of(engine)
    for level in LEVELS:
        client.post(f"/sleep?level={level}")
        require_refused(send(client, row), row)
        assert engine.seen == []
        client.post("/wake_up")
    require_served(send(client, row), row)


@each_protected
def test_hold_serves_once_someone_wakes_the_model(make_engine, client_of, row):
    """A request that is refused although it was to wait, that is lost over the wake, or that wakes by itself."""
    engine = engine_for(make_engine, row, on_sleeping_request="hold", hold_timeout_s=20)
    client = client_of(engine)
    for level in LEVELS:
        client.post(f"/sleep?level={level}")
        with ThreadPoolExecutor(1) as pool:
            held = pool.submit(send, client, row)
            wait_until(lambda held=held: engine.held == 1 or held.done())
            assert not held.done()
            assert client.get("/is_sleeping").json() == {"is_sleeping": True}
            client.post("/wake_up")
            require_served(held.result(20), row)


@each_protected
def test_hold_ends_with_the_503_at_its_deadline(make_engine, client_of, row):
    """A held request that hangs, or whose stream begins before it is admitted."""
    client = client_of(engine_for(make_engine, row, on_sleeping_request="hold", hold_timeout_s=0.02))
    client.post("/sleep")
    require_refused(send(client, row), row)


@each_protected
def test_wake_wakes_and_serves(make_engine, client_of, row):
    """A request that is refused although it was to wake the model."""
    client = client_of(engine_for(make_engine, row, on_sleeping_request="wake"))
    for level in LEVELS:
        client.post(f"/sleep?level={level}")
        require_served(send(client, row), row)
        assert client.get("/is_sleeping").json() == {"is_sleeping": False}


@pytest.mark.parametrize("policy", ["reject", "hold", "wake"])
@pytest.mark.parametrize("row", OTHERS, ids=lambda row: row.name)
def test_routes_without_weights_answer_the_same_while_asleep(make_engine, client_of, row, policy):
    """A route that needs no weights refused, held, or waking the model."""
    client = client_of(make_engine(on_sleeping_request=policy))
    awake = send(client, row)
    assert awake.status_code == row.status, awake.text
    for level in LEVELS:
        assert client.post(f"/sleep?level={level}").status_code == 200
        asleep = send(client, row)
        if row.path == "/ready":
            assert (asleep.status_code, asleep.json()) == (503, {"ready": False, "reason": "sleeping"})
        else:
            assert asleep.status_code == row.status
        if row.kind == "unchanged":
            assert asleep.content == awake.content
        assert client.get("/is_sleeping").json() == {"is_sleeping": True}


@pytest.mark.parametrize("row", CONTROL, ids=lambda row: row.name)
def test_control_routes_answer_asleep(client, row):
    """A control call that the policy for requests catches."""
    client.post("/sleep")
    response = send(client, row)
    assert response.content != SLEEPING
    assert response.status_code in {200, 400, 409}, response.text


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)
