"""Addresses that a server cannot listen on: which flag is at fault, and no traceback."""

from __future__ import annotations

import errno
import os
import socket

import pytest

from shuteye.errors import InvalidRequest
from shuteye.server.config import ServerConfig
from shuteye.server.listener import open_listener


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
