"""What control calls take, in the query or as JSON, and how vLLM's clients and ours read what they answer."""

from __future__ import annotations

import json

import pytest
from http_answers import error

BODILESS = ["/resume", "/reset_prefix_cache", "/restart_engine"]
ANY = ["/sleep", "/wake_up", "/pause", "/reload_weights", *BODILESS]


# --- bodies -------------------------------------------------------------------------------------


def test_a_json_body_is_honoured(client):
    """A sleep at level 1 for a caller who asked for level 2 in the body."""
    assert client.post("/sleep", json={"level": 2, "mode": "abort", "timeout": 5}).json()["level"] == 2
    assert client.get("/state").json()["state"]["level"] == 2
    assert client.post("/wake_up", json={"tags": ["weights"]}).json()["tags"] == ["weights"]
    assert client.get("/is_sleeping").json() == {"is_sleeping": True}


def test_a_pause_takes_its_mode_from_the_body(client, engine):
    """A pause that ends requests although the body says to keep the cache."""
    assert client.post("/pause", json={"mode": "abort", "clear_cache": True}).json() == {"status": "paused"}
    assert engine.prefix_resets == 1


def test_query_and_body_together(client):
    """A value that is dropped because the other place has one."""
    report = client.post("/sleep?level=2", json={"level": 2, "tags": ["kv_cache"]}).json()
    assert (report["level"], report["tags"]) == (2, ["kv_cache"])
    client.post("/wake_up")
    found = error(client.post("/sleep?level=1", json={"level": 2}))
    assert (found["code"], found["param"]) == (400, "query.level")
    assert client.get("/is_sleeping").json() == {"is_sleeping": False}


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/sleep?level=1&level=2", "level"),
        ("/sleep?level=1&level=1", "level"),
        ("/sleep?mode=keep&level=2&mode=abort", "mode"),
        ("/sleep?timeout=1&timeout=2", "timeout"),
        ("/pause?mode=keep&mode=abort", "mode"),
        ("/pause?clear_cache=true&clear_cache=false", "clear_cache"),
        ("/wake_up?tags=weights&tags=kv_cache&level=1&level=1", "level"),
    ],
)
def test_a_name_that_comes_twice_in_the_query_is_400(client, engine, path, param):
    """A deeper sleep than the one that was asked for first, in silence."""
    found = error(client.post(path))
    assert (found["code"], found["param"]) == (400, f"query.{param}")
    assert not engine.is_sleeping
    assert not engine.is_paused


@pytest.mark.parametrize("path", ANY)
@pytest.mark.parametrize("body", [{"leval": 2}, {"now": True}])
def test_unknown_names_in_a_body_are_400(client, path, body):
    """A misspelt name ignored in silence."""
    found = error(client.post(path, json=body))
    assert (found["code"], found["param"]) == (400, next(iter(body)))
    assert client.get("/is_sleeping").json() == {"is_sleeping": False}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/sleep", {"level": "2"}, "level"),
        ("/sleep", {"level": 3}, "level"),
        ("/sleep", {"level": True}, "level"),
        ("/sleep", {"timeout": -1}, "timeout"),
        ("/sleep", {"mode": "gently"}, "mode"),
        ("/sleep", {"tags": "weights"}, "tags"),
        ("/sleep", {"tags": []}, "tags"),
        ("/wake_up", {"tags": ["wieghts"]}, "tags"),
        ("/wake_up", {"tags": [1]}, "tags[0]"),
        ("/pause", {"clear_cache": 1}, "clear_cache"),
        ("/sleep", [1], None),
        ("/sleep", "level=2", None),
    ],
)
def test_bad_values_in_a_body_are_400(client, path, body, param):
    """A 422, a 500, or a value that is bent until it fits."""
    found = error(client.post(path, json=body))
    assert (found["code"], found["type"], found["param"]) == (400, "BadRequestError", param)


@pytest.mark.parametrize("path", ANY)
@pytest.mark.parametrize(
    "kind", ["application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/plain", None]
)
def test_bodies_that_are_no_json_are_400(client, path, kind):
    """`curl -d level=2`, which sends a form, sleeping at level 1."""
    headers = {} if kind is None else {"Content-Type": kind}
    found = error(client.post(path, content=b"level=2", headers=headers))
    assert found["code"] == 400
    assert "application/json" in found["message"]
    assert client.get("/is_sleeping").json() == {"is_sleeping": False}


@pytest.mark.parametrize("path", ["/sleep", "/update_weights"])
def test_a_control_call_s_json_has_the_limits_of_any_other(client, path):
    """Catches a second way to read JSON, with other limits and other words: length, depth, Unicode, NaN."""

    def posted(content):
        return client.post(path, content=content, headers={"Content-Type": "application/json"})

    field = b"mode" if path == "/sleep" else b"path"
    status = posted(b'{"%b": "%b"}' % (field, b"x" * (4 << 20))).status_code
    assert status == 413
    for value, says in ((b"[" * 200 + b"]" * 200, "nested more than"), (b'"\\ud800"', "surrogate"), (b"NaN", "NaN")):
        found = error(posted(b'{"%b": %b}' % (field, value)))
        assert (found["code"], says in found["message"]) == (400, True), found


@pytest.mark.parametrize("path", ANY[:3])
def test_json_that_is_broken_is_400(client, path):
    """A message about a character named `body`."""
    found = error(client.post(path, content=b"{", headers={"Content-Type": "application/json"}))
    assert found["code"] == 400
    assert "not valid JSON" in found["message"]
    assert "character body" not in found["message"]


@pytest.mark.parametrize("path", ["/sleep", "/wake_up", "/pause", "/resume", "/reset_prefix_cache", "/reload_weights"])
def test_an_empty_body_stays_fine(client, path):
    """`curl -d ''`, or a client that always sends a content type, refused."""
    for kind in ("application/json", "application/x-www-form-urlencoded"):
        assert client.post(path, content=b"", headers={"Content-Type": kind}).status_code == 200
        client.post("/wake_up")


def test_the_document_tells_of_the_bodies(client):
    """A client made from the document that cannot send a body, or may send any."""
    paths = client.get("/openapi.json").json()["paths"]
    for path in ("/sleep", "/wake_up", "/pause"):
        operation = paths[path]["post"]
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        assert schema["properties"].keys() == {one["name"] for one in operation["parameters"]}
        assert schema["additionalProperties"] is False
        assert not operation["requestBody"].get("required")
    assert "enum" in json.dumps(paths["/sleep"]["post"]["requestBody"])


# --- answers ------------------------------------------------------------------------------------


def test_vllm_s_clients_find_their_keys(client):
    """Answers of vLLM 0.33: `status` and `level`, `status` and the names of the tags that were asked for."""
    slept = client.post("/sleep?level=2").json()
    assert (slept["status"], slept["level"]) == ("sleeping", 2)
    assert client.post("/sleep?level=2").json()["status"] == "sleeping"
    partly = client.post("/wake_up?tags=weights").json()
    assert (partly["status"], partly["tags"]) == ("sleeping", ["weights"])
    client.post("/sleep?level=2")
    woken = client.post("/wake_up").json()
    assert (woken["status"], woken["tags"]) == ("awake", None)
    assert client.post("/wake_up").json()["status"] == "awake"
    dozing = client.post("/sleep?level=0").json()
    assert (dozing["status"], dozing["level"]) == ("sleeping", 0)


def test_what_was_measured_of_each_tag_has_a_key_of_its_own(client):
    """The reports of single tags lost to vLLM's `tags`."""
    slept = client.post("/sleep").json()
    assert [tag["tag"] for tag in slept["tag_reports"]] == ["weights", "kv_cache"]
    assert slept["tags"] is None
    woken = client.post("/wake_up?tags=weights,kv_cache").json()
    assert [tag["residency"] for tag in woken["tag_reports"]] == ["resident", "resident"]
    assert woken["tags"] == ["weights", "kv_cache"]


def test_a_missing_body_is_refused_where_there_must_be_one(client):
    """A call without the field that it needs, taken for a bug of ours."""
    response = client.post("/collective_rpc")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "method")
    assert client.post("/reload_weights").status_code == 200
