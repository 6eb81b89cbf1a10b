"""The engine process's own start, and its end when the server is killed."""

import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from shuteye.engine import process

PATIENCE_S = 60


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


SERVER = """
import os, subprocess, sys, time
command = [sys.executable, "-m", "shuteye.engine.process", "ipc:///nowhere", str(os.getpid()), "text", "info"]
print(subprocess.Popen(command).pid, flush=True)
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


def ignores_sigterm(pid):
    """What the engine process does once it is tied to its parent, before it reads its config."""
    mask = status_of(pid, "SigIgn")
    return mask is not None and bool(int(mask, 16) & 1 << signal.SIGTERM - 1)


def test_no_engine_outlives_a_server_that_is_killed():
    """Would catch engines left behind, with all their memory, by a server that the kernel or a supervisor killed.

    The engine waits for its config on a pipe that this test keeps open: nothing but the kernel's signal ends it.
    """
    config_read, config_write = os.pipe()
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=config_read, stdout=subprocess.PIPE, text=True)
    os.close(config_read)
    engine = int(server.stdout.readline())
    try:
        assert wait_until(lambda: ignores_sigterm(engine)), "the engine never began"
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


def test_an_engine_whose_server_was_gone_before_it_began_ends():
    """Would catch the race that the kernel's signal alone leaves: a parent that dies first sends nothing any more."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait(PATIENCE_S)
    command = [sys.executable, "-m", "shuteye.engine.process", "ipc:///nowhere", str(gone.pid), "text", "info"]
    engine = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert engine.wait(PATIENCE_S) == 1  # although nothing has been written to its pipe, nor is closed
        assert "parent process has gone" in engine.stderr.read()
    finally:
        engine.kill()
        engine.wait(PATIENCE_S)
        engine.stdin.close()
        engine.stderr.close()
