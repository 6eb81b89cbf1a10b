"""The engine process's own start."""

import types

import pytest

from shuteye.engine import process


@pytest.fixture
def no_prctl(monkeypatch):
    """The test's own process must not be tied to its parent."""
    libc = types.SimpleNamespace(prctl=lambda *_args: 0)
    monkeypatch.setattr(process.ctypes, "CDLL", lambda *_args, **_options: libc)


def test_a_server_may_be_process_1(no_prctl, monkeypatch):
    """Would catch an engine that takes the server of a container, which has process id 1, for init."""
    monkeypatch.setattr(process.os, "getppid", lambda: 1)
    process._die_with_parent(1)


def test_an_engine_whose_server_has_gone_ends(no_prctl, monkeypatch):
    monkeypatch.setattr(process.os, "getppid", lambda: 1)
    with pytest.raises(SystemExit):
        process._die_with_parent(4711)
