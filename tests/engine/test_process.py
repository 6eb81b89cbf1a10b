"""The engine process's own start and its channel."""

import signal
import subprocess
import sys

import pytest
import zmq

from shuteye.engine import process
from shuteye.engine.liveness import Pulse


class WatchedPoller:
    """Says what the pulse tells while the engine waits for its socket."""

    def __init__(self, pulse):
        self.pulse = pulse
        self.seen = []

    def poll(self, _timeout_ms):
        self.seen.append(self.pulse.turns % 2)
        return []


def test_the_pulse_tells_work_from_waiting():
    """Would catch an idle engine taken for one whose step never returns, or the other way round."""
    pulse = Pulse()
    poller = WatchedPoller(pulse)
    socket = zmq.Context.instance().socket(zmq.PAIR)
    channel = process.ZmqChannel(socket, pulse)
    channel._poller = poller
    try:
        assert pulse.turns == 0
        for _ in range(3):
            channel.receive(0.0)
            assert pulse.turns % 2 == 1
        assert poller.seen == [0, 0, 0]
        assert pulse.turns == 7
    finally:
        pulse.close()
        socket.close()


def test_a_wake_ends_the_wait_once():
    """Would catch an engine that learns of a dead rank with its next message, or that never waits again."""
    pulse = Pulse()
    with zmq.Context.instance().socket(zmq.PAIR) as socket:
        channel = process.ZmqChannel(socket, pulse)
        channel.wake()
        channel.wake()
        assert channel.receive(None) == []
        assert channel.receive(0.0) == []
    pulse.close()


LOAD = """
import time
from shuteye.engine.process import _stop_loading_on_sigterm
from shuteye.engine.liveness import Pulse
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
    child = subprocess.Popen(
        [sys.executable, "-c", LOAD.format(state=state)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert child.stdout.readline() == "loading\n"
    child.send_signal(signal.SIGTERM)
    if state:
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.2)
    assert child.communicate("\n" if state else None, timeout=60)[0] == "swept\n"
    assert child.returncode == 0
