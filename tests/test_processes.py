"""What ties a process to its parent."""

import signal
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

import pytest

from shuteye import processes as parent


@pytest.fixture
def no_prctl(monkeypatch):
    """The test's own process must not be tied to its parent."""
    libc = types.SimpleNamespace(prctl=lambda *_args: 0)
    monkeypatch.setattr(parent.ctypes, "CDLL", lambda *_args, **_options: libc)


def test_a_server_may_be_process_1(no_prctl, monkeypatch):
    """Would catch an engine that takes the server of a container, which has process id 1, for init."""
    monkeypatch.setattr(parent.os, "getppid", lambda: 1)
    parent.die_with_parent(1)


def test_a_process_whose_parent_has_gone_ends(no_prctl, monkeypatch):
    monkeypatch.setattr(parent.os, "getppid", lambda: 1)
    with pytest.raises(SystemExit):
        parent.die_with_parent(4711)


PARENT = """
    import os, subprocess, sys
    code = f"import time; from shuteye.processes import die_with_parent; die_with_parent({os.getpid()}); "
    child = subprocess.Popen([sys.executable, "-c", code + "print(1, flush=True); time.sleep(60)"], stdout=-1)
    child.stdout.readline()
    print(child.pid, flush=True)
    os.kill(os.getpid(), 9)
"""


def is_alive(stat):
    try:
        return stat.read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_process_dies_with_its_killed_parent():
    """Would catch an engine, or a conversion, that goes on for minutes after its server was killed."""
    command = [sys.executable, "-c", textwrap.dedent(PARENT)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60)  # returns once both have closed it
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 60  # its files are closed a moment before it is dead
    while is_alive(Path(f"/proc/{done.stdout.strip()}/stat")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(Path(f"/proc/{done.stdout.strip()}/stat"))
