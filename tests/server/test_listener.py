"""Addresses that a server cannot listen on: which flag is at fault, and no traceback."""

from __future__ import annotations

import errno
import os
import socket

import httpx2
import pytest

from shuteye.errors import InvalidRequest
from shuteye.server.config import ServerConfig
from shuteye.server.listener import close_listener, open_listener


@pytest.mark.parametrize("host", ["300.1.1.1", "a..b", "x" * 70, "no\0name", "no-such-name.invalid"])
def test_a_host_that_does_not_resolve_is_named(host):
    """A traceback, or advice about the port, for a name that nobody has."""
    with pytest.raises(InvalidRequest, match="neither an address nor a name") as refused:
        open_listener(ServerConfig(host=host, port=0))
    assert refused.value.param == "host"


def test_a_host_that_is_another_machine_s():
    """Advice to stop what listens there."""
    with pytest.raises(InvalidRequest, match="not an address of this machine") as refused:
        open_listener(ServerConfig(host="192.0.2.1", port=0))  # RFC 5737: nobody's
    assert refused.value.param == "host"


def test_a_port_in_use():
    """An error about the host."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidRequest, match=f"127.0.0.1:{port}: Address already in use. Stop what") as refused:
            open_listener(ServerConfig(port=port))
    assert refused.value.param == "port"


@pytest.mark.parametrize(("code", "field"), [(errno.EACCES, "port"), (errno.ENOBUFS, "host")])
def test_a_port_that_is_not_allowed(monkeypatch, code, field):
    """Permission denied, and not a word about what for."""

    def refuse(*_args, **_options):
        raise OSError(code, f"{os.strerror(code)} (while attempting to bind on address ('127.0.0.1', 80))")

    monkeypatch.setattr(socket, "create_server", refuse)
    with pytest.raises(InvalidRequest, match=f"80: {os.strerror(code)}[.] ") as refused:
        open_listener(ServerConfig(port=80))
    assert refused.value.param == field
    assert "attempting" not in refused.value.message


def test_a_unix_socket_takes_connections_and_its_name_goes_with_it(tmp_path):
    """A path that can be used but once, or a port that is open beside it."""
    config = ServerConfig(uds=str(tmp_path / "server.sock"))
    assert config.is_loopback
    listener = open_listener(config)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(config.uds)
    close_listener(listener, config)
    assert not (tmp_path / "server.sock").exists()


def test_a_unix_socket_that_was_left_makes_room_but_nothing_else_does(tmp_path):
    """A restart after a kill that fails, a server cut off by another, or a file of somebody's that is gone."""
    config = ServerConfig(uds=str(tmp_path / "server.sock"))
    open_listener(config).close()  # as a process that is killed leaves it
    with open_listener(config), pytest.raises(InvalidRequest, match="in use") as refused:
        open_listener(config)
    assert refused.value.param == "uds"
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(InvalidRequest):
        open_listener(ServerConfig(uds=str(file)))
    assert file.read_text() == "mine"


@pytest.mark.parametrize("path", ["no/such/directory/s", "x" * 200])
def test_a_path_that_cannot_be_listened_on_is_named(tmp_path, path):
    """A traceback for a path that is too long."""
    with pytest.raises(InvalidRequest, match="Choose another path") as refused:
        open_listener(ServerConfig(uds=str(tmp_path / path)))
    assert refused.value.param == "uds"


def test_a_server_answers_on_a_unix_socket(make_engine, serve_engine_on, tmp_path):
    """Connections without an address that nobody can answer, or control routes refused by their host."""
    path = str(tmp_path / "s")
    with serve_engine_on(make_engine(), ServerConfig(uds=path, dev_mode=True)):
        transport = httpx2.HTTPTransport(uds=path)
        with httpx2.Client(transport=transport, base_url="http://localhost") as client:
            assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
            assert client.get("/is_sleeping").json() == {"is_sleeping": False}


@pytest.mark.parametrize("prefix", ["", "/llm"])
def test_a_root_path_may_stand_before_every_path(make_engine, client_of, prefix):
    """404 behind a proxy that leaves the prefix, or 413 for weights whose route is not recognised under it."""
    client = client_of(make_engine(), root_path="/llm", max_body_bytes=100)
    assert client.get(f"{prefix}/v1/models").status_code == 200
    upload = {"content": b"x" * 200, "headers": {"Content-Type": "application/octet-stream"}}
    assert client.post(f"{prefix}/update_weights", **upload).status_code != 413
    assert client.get(f"{prefix}/nothing").status_code == 404


@pytest.mark.parametrize("wrong", ["llm", "/llm/", "/"])
def test_a_root_path_of_another_form_is_refused(wrong):
    """A prefix that no path begins with."""
    with pytest.raises(InvalidRequest) as refused:
        ServerConfig(root_path=wrong)
    assert refused.value.param == "root_path"
