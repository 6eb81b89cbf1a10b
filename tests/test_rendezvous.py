"""The directory of an engine's socket: gone once it is of no use, whoever is killed when."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from shuteye.rendezvous import PREFIX, Rendezvous

HOLD = """
import time
from shuteye.rendezvous import Rendezvous
held = Rendezvous()
print(held.endpoint, flush=True)
time.sleep(60)
"""


@pytest.fixture
def directory(temporary):
    return temporary


def holder(directory):
    """A process that has one, and the name of it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(directory)},
    )
    name = Path(process.stdout.readline().strip().removeprefix("ipc://")).parent
    return process, name


def end(process):
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_socket_directory_is_removed_by_close(directory):
    meeting = Rendezvous()
    (found,) = directory.iterdir()
    assert meeting.endpoint == f"ipc://{found}/engine"
    assert found.stat().st_mode & 0o777 == 0o700
    meeting.close()
    meeting.close()
    assert not list(directory.iterdir())


def test_orphans_are_swept_and_nothing_else(directory):
    """Would catch a directory left for ever by a start that was killed; or one taken from under another's start."""
    process, name = holder(directory)
    try:
        stranger = directory / "shuteye-data"
        stranger.mkdir()
        link = directory / f"{PREFIX}link"
        link.symlink_to(stranger)
        first = Rendezvous()
        assert name.is_dir()
    finally:
        end(process)
    assert name.is_dir()
    second = Rendezvous()
    assert not name.exists()
    assert stranger.is_dir()
    assert link.is_symlink()
    assert len(list(directory.glob(f"{PREFIX}*"))) == 3
    first.close()
    second.close()


def test_a_directory_swept_while_it_was_made_is_made_again(directory, monkeypatch):
    """Would catch a socket that cannot be bound, because another start took the directory for an orphan."""
    made = []
    make = tempfile.mkdtemp

    def swept(**options):
        made.append(make(**options))
        if len(made) == 1:
            os.rmdir(made[0])
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", swept)
    meeting = Rendezvous()
    assert len(made) == 2
    assert made[1] in meeting.endpoint
    meeting.close()


def test_engines_started_at_once_keep_their_own_socket_directories(directory):
    """Would catch the race of two starts."""
    processes = [holder(directory) for _ in range(3)]
    try:
        time.sleep(0.05)
        assert all(name.is_dir() for _process, name in processes)
    finally:
        for process, _name in processes:
            end(process)
