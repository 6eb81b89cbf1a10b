"""The engine process's own start."""

import signal
import subprocess
import sys
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


LOAD = """
import time
from shuteye.engine.process import _stop_loading_on_sigterm
from shuteye.engine.pulse import Pulse
pulse = Pulse()
_stop_loading_on_sigterm(pulse)
{state}
try:
    print("loading", flush=True)
    input()
finally:
    print("swept", flush=True)
"""


@pytest.mark.parametrize("state", ["", "pulse.waiting()", "pulse.working()"], ids=["loading", "waiting", "working"])
def test_sigterm_ends_loading_in_order_and_nothing_else(state):
    """Would catch a half-written image of gigabytes that stays, and a signal to all that ends an engine in service."""
    process = subprocess.Popen(
        [sys.executable, "-c", LOAD.format(state=state)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGTERM)
    if state:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.2)
    assert process.communicate("\n" if state else None, timeout=60)[0] == "swept\n"
    assert process.returncode == 0
