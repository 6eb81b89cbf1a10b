"""Shared memory that ranks of a group hand to one another."""

import os
import secrets
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from shuteye.errors import GroupAborted
from shuteye.parallel import handed_region
from shuteye.parallel.handed_region import join_handed


@pytest.fixture
def name():
    return f"shuteye-test-{secrets.token_hex(8)}"


def join(name, rank, size=2, *, epoch=3, timeout_s=5.0, stopped=lambda: None):
    return join_handed(name, rank, size, epoch=epoch, timeout_s=timeout_s, stopped=stopped)


def test_ranks_meet_whoever_comes_first(name):
    """Would catch memory of which each rank has its own."""

    def be(rank):
        time.sleep(0.1 * (2 - rank))  # the one that makes it comes last
        group = join(name, rank, 3)
        x = torch.full((4,), float(rank + 1))
        group.all_reduce(x)
        group.close()
        return x.tolist()

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(be, range(3))) == [[6.0] * 4] * 3
    deadline = time.monotonic() + 2
    while any(thread.name == "shuteye-region" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert not any("shuteye-group" in link for link in links)


def test_a_first_rank_that_is_slow_has_its_memory_itself(name, monkeypatch):
    """Would catch memory that is closed here, as all others have it, before this rank has mapped it."""
    real = handed_region.ShmGroup

    def slow(source, rank, *arguments, **options):
        if rank == 0:
            time.sleep(0.5)
        return real(source, rank, *arguments, **options)

    monkeypatch.setattr(handed_region, "ShmGroup", slow)
    with ThreadPoolExecutor(2) as threads:
        for group in threads.map(lambda rank: join(name, rank), range(2)):
            group.close()


def test_a_group_that_is_given_up_is_not_waited_for(name):
    """Would catch a rank that waits its full time for one that is dead."""
    began = time.monotonic()
    with pytest.raises(GroupAborted, match="rank 0 was ended"):
        join(name, 1, stopped=lambda: "rank 0 was ended" if time.monotonic() > began + 0.2 else None)
    assert time.monotonic() - began < 2


def test_a_first_rank_that_does_not_come_is_named(name):
    with pytest.raises(GroupAborted, match=r"first rank has not made its memory within 0\.2 s"):
        join(name, 1, timeout_s=0.2)


def test_a_rank_of_another_epoch_is_refused(name):
    first = join(name, 0, epoch=4)
    with pytest.raises(GroupAborted, match="epoch 3, the group of epoch 4"):
        join(name, 1, epoch=3)
    first.close()


def test_a_name_that_is_taken_is_refused(name):
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(f"\0{name}")
        with pytest.raises(GroupAborted, match="its name is taken"):
            join(name, 0)


@pytest.mark.parametrize("side", ["offers", "asks"])
def test_another_user_gets_nothing_and_gives_nothing(name, side, monkeypatch):
    """Would catch memory of a model that anybody on the machine can map."""
    if side == "offers":
        first = join(name, 0)
    else:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"\0{name}")
        listener.listen()
    monkeypatch.setattr(handed_region, "_is_ours", lambda connection: False)
    if side == "offers":
        with socket.socket(socket.AF_UNIX) as other:
            other.settimeout(2)
            other.connect(f"\0{name}")
            assert socket.recv_fds(other, 1, 1)[:2] == (b"", [])
        monkeypatch.undo()
        join(name, 1).close()  # who does belong is still served
        first.close()
    else:
        with pytest.raises(GroupAborted, match="offered by another user"):
            join(name, 1, timeout_s=1.0)
        listener.close()
