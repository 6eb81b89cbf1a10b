"""Which key opens which route."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
from fastapi.routing import iter_route_contexts
from http_answers import error

from shuteye.errors import InvalidRequest
from shuteye.server.config import ServerConfig
from shuteye.server.http.admission import ModelRoute
from shuteye.server.http.auth import ControlRoute, InferenceRoute

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "production.md"
KEYED = (ModelRoute, InferenceRoute)

API, ADMIN = "sk-inference", "sk-admin"
KEYS = {"none": None, "api": API, "admin": ADMIN, "wrong": "sk-wrong"}
OPEN = [("GET", "/health"), ("GET", "/ping"), ("GET", "/ready"), ("GET", "/version"), ("GET", "/docs")]
INFERENCE = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/embeddings"),
    ("POST", "/invocations"),
    ("GET", "/v1/models"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/metrics"),
    ("GET", "/state"),
]
CONTROL = [
    ("GET", "/is_sleeping"),
    ("GET", "/is_paused"),
    ("POST", "/wake_up"),
    ("POST", "/sleep"),
    ("POST", "/pause"),
    ("POST", "/resume"),
    ("POST", "/update_weights"),
    ("POST", "/reload_weights"),
    ("POST", "/collective_rpc"),
    ("POST", "/restart_engine"),
    ("POST", "/reset_prefix_cache"),
]


def ask(client, method, path, key):
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return client.request(method, path, headers=headers, json={} if method == "POST" else None)


def documented_routes():
    """The paths of each row of the table of keys in the guide: inference, control, open."""
    text = GUIDE.read_text(encoding="utf-8").partition("| routes | no key |")[2].partition("\n\n")[0]
    return [re.findall(r"`(/[^`]*)`", row.split("|")[1]) for row in text.splitlines()[2:]]


def test_the_guide_lists_every_route_under_the_key_that_opens_it(client):
    """A route that the guide calls open although it wants a key, or the other way round, or that it forgets."""
    kinds = {"inference": set(), "control": set(), "open": set()}
    for route in iter_route_contexts(client.app.routes):
        kind = type(route.original_route)
        name = "control" if issubclass(kind, ControlRoute) else "inference" if issubclass(kind, KEYED) else "open"
        kinds[name].add(route.path_format)
    inference, control, open_to_all = map(set, documented_routes())
    assert (inference, control, open_to_all) == (kinds["inference"], kinds["control"], kinds["open"])


@pytest.mark.parametrize("dev_mode", [False, True])
@pytest.mark.parametrize("sleep_mode", [False, True])
@pytest.mark.parametrize("with_admin_key", [False, True])
@pytest.mark.parametrize("with_api_key", [False, True])
def test_every_key_opens_its_routes_and_no_others(
    make_engine, client_of, *, dev_mode, sleep_mode, with_admin_key, with_api_key
):
    """Any route open to a key that must not open it, or closed to one that must."""
    client = client_of(
        make_engine(enable_sleep_mode=sleep_mode),
        dev_mode=dev_mode,
        api_key=API if with_api_key else None,
        admin_api_key=ADMIN if with_admin_key else None,
    )
    for name, key in KEYS.items():
        for method, path in OPEN:
            assert ask(client, method, path, key).status_code not in (401, 403, 404), (name, path)
        for method, path in INFERENCE:
            opens = not with_api_key or name == "api" or (name == "admin" and with_admin_key)
            assert (ask(client, method, path, key).status_code != 401) is opens, (name, path)
        for method, path in CONTROL:
            found = ask(client, method, path, key).status_code
            expected = expected_of_control(
                name,
                exists=(sleep_mode or path == "/restart_engine") and (with_admin_key or dev_mode),
                keyed=with_admin_key,
                api=with_api_key,
            )
            assert (found if found in (401, 403, 404) else 200) == expected, (name, path, found)


def expected_of_control(name, *, exists, keyed, api):
    if not exists:
        return 404
    if not keyed or name == "admin":
        return 200
    return 403 if name == "api" and api else 401


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Basic sk-inference", "sk-inference", "Bearer sk-inferenc", "Bearer é"]
)
def test_malformed_headers_do_not_open(client_of, engine, header):
    """A crash or an opening by a header that is no bearer token."""
    client = client_of(engine, api_key=API)
    response = client.get("/v1/models", headers={"Authorization": header.encode()})
    found = error(response)
    assert (found["code"], found["type"]) == (401, "AuthenticationError")
    assert response.headers["www-authenticate"] == "Bearer"
    assert API not in response.text


def test_the_scheme_may_be_written_in_any_case(client_of, engine):
    """RFC 9110: the scheme is case-insensitive."""
    client = client_of(engine, api_key=API)
    assert client.get("/v1/models", headers={"Authorization": f"bearer {API}"}).status_code == 200


def test_a_key_is_checked_before_the_body_and_before_sleep(client_of, engine):
    """Strangers learning the state, or having their bodies parsed."""
    client = client_of(engine, api_key=API)
    client.post("/sleep")
    for content in (b"{", b""):
        assert client.post("/v1/completions", content=content).status_code == 401


@pytest.mark.parametrize(("origin", "code"), [("http://evil.example", 403), ("null", 403), ("http://localhost", 200)])
def test_without_a_key_web_pages_of_other_origins_control_nothing(client, origin, code):
    """Any web page a developer visits putting the model on localhost to sleep."""
    assert client.post("/sleep", headers={"Origin": origin}).status_code == code
    assert client.get("/is_sleeping").json() == {"is_sleeping": code == 200}


LOOPBACK_NAMES = ("localhost", "LOCALHOST:8000", "127.0.0.1:8000", "127.8.9.1", "[::1]:8000")
STRANGE_NAMES = (
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "",
    "a@localhost",
)


@pytest.mark.parametrize("with_origin", [False, True])
@pytest.mark.parametrize(
    ("host", "code"), [*((name, 200) for name in LOOPBACK_NAMES), *((name, 403) for name in STRANGE_NAMES)]
)
def test_without_a_key_only_names_of_this_machine_control_it(client, host, code, with_origin):
    """DNS rebinding: a web page whose own name was made to mean 127.0.0.1 is no other origin than the server."""
    headers = {"Host": host} | ({"Origin": f"http://{host}"} if with_origin else {})
    response = client.post("/sleep", headers=headers)
    assert response.status_code == code
    assert client.get("/is_sleeping").json() == {"is_sleeping": code == 200}
    if code == 403:
        assert "--allowed-hosts" in error(response)["message"]


@pytest.mark.parametrize(
    ("config", "host", "code"),
    [
        ({"host": "127.0.0.1", "allowed_hosts": ("Box.lan",)}, "box.lan:8000", 200),
        ({"host": "127.0.0.1"}, "192.168.0.7", 403),
        ({"host": "0.0.0.0"}, "192.168.0.7:8000", 200),
        ({"host": "0.0.0.0"}, "[fe80::1]", 200),
        ({"host": "0.0.0.0"}, "box.lan", 403),
        ({"host": "0.0.0.0", "allowed_hosts": ("box.lan",)}, "box.lan", 200),
        ({"host": "box.lan"}, "box.lan:8000", 200),
        ({"admin_api_key": ADMIN}, "evil.example", 200),
    ],
)
def test_a_server_on_another_address_answers_to_that_address_and_to_allowed_hosts(
    make_engine, client_of, config, host, code
):
    """A server on purpose reachable by another name that cannot be controlled by it, or by every name."""
    client = client_of(make_engine(), **config)
    headers = {"Host": host, "Authorization": f"Bearer {ADMIN}"}
    assert client.post("/sleep", headers=headers).status_code == code


def test_development_mode_warns(make_engine, client_of, caplog):
    """Open control routes that nobody notices."""
    with caplog.at_level(logging.WARNING):
        client_of(make_engine(), dev_mode=True)
        assert "without a key" in caplog.text
        assert "DANGER" not in caplog.text
        client_of(make_engine(), dev_mode=True, host="0.0.0.0")
        assert "DANGER" in caplog.text
        caplog.clear()
        client_of(make_engine(), dev_mode=True, admin_api_key=ADMIN)
        assert caplog.text == ""
        client_of(make_engine(enable_sleep_mode=False), dev_mode=True)
        assert "/restart_engine" in caplog.text
        assert "/sleep" not in caplog.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"api_key": "same", "admin_api_key": "same"}, "admin_api_key"),
        ({"api_key": ""}, "api_key"),
        ({"admin_api_key": " "}, "admin_api_key"),
        ({"port": 70000}, "port"),
        ({"max_body_bytes": 0}, "max_body_bytes"),
        ({"shutdown_grace_s": -1}, "shutdown_grace_s"),
        ({"engine_restarts": -1}, "engine_restarts"),
        ({"engine_restart_delay_s": -1.0}, "engine_restart_delay_s"),
        ({"served_model_name": ("",)}, "served_model_name"),
    ],
)
def test_bad_configuration_is_refused(fields, param):
    """One key for both kinds of routes; an empty key that anyone could send."""
    with pytest.raises(InvalidRequest) as raised:
        ServerConfig(**fields)
    assert raised.value.param == param


@pytest.mark.parametrize("key", ["secret\n", " secret", "sec\nret", "sec\tret"])
@pytest.mark.parametrize("name", ["api_key", "admin_api_key"])
def test_a_key_that_no_header_can_carry_is_refused_at_once_and_not_shown(name, key):
    """Would catch a server that everybody is locked out of, because its key was read with a line break."""
    with pytest.raises(InvalidRequest, match=name) as refused:
        ServerConfig(**{name: key})
    assert "sec" not in refused.value.message
