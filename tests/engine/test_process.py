"""The engine process's own start, and its end when the server is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zmq

from shuteye.engine import process
from shuteye.engine.liveness import Pulse

PATIENCE_S = 60


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


SERVER = """
import os, subprocess, sys, time
command = [sys.executable, "-m", "shuteye.engine.process", "ipc:///nowhere", str(os.getpid()), "{fd}"]
print(subprocess.Popen(command, pass_fds=[{fd}]).pid, flush=True)
time.sleep(600)
"""


def status_of(pid, field):
    """A field of /proc/PID/status; None once the process is gone, or a zombie that nobody has waited for."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return None if fields["State"].startswith(("Z", "X")) else fields[field]


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def ignores_sigint(pid):
    """What the engine process does once it is tied to its parent, before it reads its config."""
    mask = status_of(pid, "SigIgn")
    return mask is not None and bool(int(mask, 16) & 1 << signal.SIGINT - 1)


def test_no_engine_outlives_a_server_that_is_killed():
    """Would catch engines left behind, with all their memory, by a server that the kernel or a supervisor killed.

    The engine waits for its config on a pipe that this test keeps open: nothing but the kernel's signal ends it.
    """
    config_read, config_write = os.pipe()
    pulse = Pulse()
    command = [sys.executable, "-c", SERVER.format(fd=pulse.fd)]
    server = subprocess.Popen(command, stdin=config_read, stdout=subprocess.PIPE, text=True, pass_fds=[pulse.fd])
    os.close(config_read)
    engine = int(server.stdout.readline())
    try:
        assert wait_until(lambda: ignores_sigint(engine)), "the engine never began"
        server.kill()
        server.wait(PATIENCE_S)
        assert wait_until(lambda: status_of(engine, "Pid") is None), "the engine outlived its server"
    finally:
        if status_of(engine, "Pid") is not None:
            os.kill(engine, signal.SIGKILL)
        server.kill()
        server.wait(PATIENCE_S)
        server.stdout.close()
        os.close(config_write)
        pulse.close()


def test_an_engine_whose_server_was_gone_before_it_began_ends():
    """Would catch the race that the kernel's signal alone leaves: a parent that dies first sends nothing any more."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait(PATIENCE_S)
    command = [sys.executable, "-m", "shuteye.engine.process", "ipc:///nowhere", str(gone.pid), "0"]
    engine = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert engine.wait(PATIENCE_S) == 1  # although nothing has been written to its pipe, nor is closed
        assert "parent process has gone" in engine.stderr.read()
    finally:
        engine.kill()
        engine.wait(PATIENCE_S)
        engine.stdin.close()
        engine.stderr.close()


def test_an_engine_that_is_not_needed_ends_in_silence():
    """Would catch a traceback beside the help of `shuteye serve --help`: its engine has begun, and is told nothing."""
    pulse = Pulse()
    command = [sys.executable, "-m", "shuteye.engine.process", "ipc:///nowhere", str(os.getpid()), str(pulse.fd)]
    done = subprocess.run(command, pass_fds=[pulse.fd], input=b"", capture_output=True, timeout=PATIENCE_S, check=False)
    pulse.close()
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
