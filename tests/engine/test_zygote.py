"""Zygotes and what they fork: who lives, who ends with whom, and what is told of an end."""

import os
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from shuteye_server import children_of, is_running

from shuteye.config import EngineConfig
from shuteye.engine.forking import ForkOrder, new_pair, receive_announcement
from shuteye.engine.start import EngineStart
from shuteye.frontend.zygote import Zygote
from shuteye.logs import LogSettings
from shuteye.models.converter import Order, obtain_image
from shuteye.models.progress import no_progress
from shuteye.parallel.shards import ONE_RANK
from shuteye.typed_frames import encode

PATIENCE_S = 60


@pytest.fixture
def zygote():
    zygote = Zygote()
    yield zygote
    zygote.close()


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def can_be_read(fd):
    return bool(select.select([fd], [], [], PATIENCE_S)[0])


def begun(process, config):
    """An engine that was told to serve `config`, once it is there."""
    process.tell(encode(EngineStart(config, LogSettings())))
    assert can_be_read(process.channel_fd)
    process.take_announcement()
    return process


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


SERVER = """
import time
from shuteye.frontend.zygote import Zygote

zygote = Zygote()
waiting = [zygote.fork(), zygote.fork()]
print(zygote.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def server():
    """A process with two engines that wait to be told what to serve: itself, its zygote's id, and theirs."""
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    zygote = int(process.stdout.readline())
    assert wait_until(lambda: len(children_of(zygote)) == 2), "nothing was forked"
    engines = children_of(zygote)
    yield process, zygote, engines
    process.kill()
    process.wait(PATIENCE_S)
    process.stdout.close()
    for pid in engines:
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)


def test_no_engine_outlives_a_server_that_is_killed(server):
    """Would catch engines left behind, with all their memory, by a server that the kernel or a supervisor killed."""
    process, zygote, engines = server
    process.kill()
    assert wait_until(lambda: not any(map(is_running, [zygote, *engines]))), "something outlived the server"


def test_engines_outlive_their_zygote_and_end_with_the_server(server):
    """Would catch a small process whose end ends all models, and engines that nothing ends any more."""
    process, zygote, engines = server
    os.kill(zygote, signal.SIGKILL)
    assert wait_until(lambda: not is_running(zygote))
    time.sleep(0.1)  # the kernel tells them at once, if it tells them
    assert all(map(is_running, engines))
    process.kill()
    assert wait_until(lambda: not any(map(is_running, engines))), "an engine outlived the server"


def test_an_engine_ends_with_whoever_has_it_even_if_it_never_looks(server):
    """Would catch a stopped engine that stays, as one that only looks for its server by itself would."""
    process, _zygote, engines = server
    for pid in engines:
        os.kill(pid, signal.SIGSTOP)
    process.kill()
    assert wait_until(lambda: not any(map(is_running, engines)))


@pytest.fixture
def config(tiny_checkpoint, core_cache):
    return EngineConfig(model=str(tiny_checkpoint), cache_dir=core_cache, num_threads=1)


def test_how_an_engine_ended_is_known_though_it_is_no_child(zygote, config):
    """Would catch a server that cannot tell a crash from an end in order."""
    killed, ended = begun(zygote.fork(), config), begun(zygote.fork(), config)
    os.kill(killed.pid, signal.SIGKILL)
    os.kill(ended.pid, signal.SIGTERM)  # while it loads, or waits for somebody to meet it
    assert can_be_read(killed.ended_fd)
    assert wait_until(lambda: killed.exit_code is not None)
    assert killed.exit_code == -signal.SIGKILL
    assert can_be_read(ended.ended_fd)
    assert wait_until(lambda: ended.exit_code is not None)
    assert ended.exit_code == 0
    for process in (killed, ended):
        process.close()
        assert process.exit_code is not None


def test_a_zygote_that_has_ended_is_replaced_by_the_next_fork(zygote, config):
    """Would catch a server that can start no model any more, and an end that is forgotten with the zygote."""
    first = begun(zygote.fork(), config)
    before = zygote.pid
    os.kill(before, signal.SIGKILL)
    assert wait_until(lambda: zygote.has_ended)
    second = begun(zygote.fork(), config)
    assert zygote.pid != before
    assert parent_of(second.pid) == zygote.pid
    assert is_running(first.pid)
    first.close()
    second.close()


def test_an_order_that_dies_with_its_zygote_is_told(zygote):
    """Would catch a start that waits for ever for a process that will never be."""
    os.kill(zygote.pid, signal.SIGSTOP)
    process = zygote.fork()
    os.kill(zygote.pid, signal.SIGKILL)
    assert can_be_read(process.channel_fd)
    with pytest.raises(OSError, match="before it began"):
        process.take_announcement()
    process.close()


def test_an_engine_that_is_not_needed_ends_in_silence(zygote, capfd):
    """Would catch a traceback beside the help of `shuteye serve --help`: its engine has begun, and is told nothing."""
    process = zygote.fork()
    assert wait_until(lambda: children_of(zygote.pid))
    process.close()
    assert wait_until(lambda: not children_of(zygote.pid))
    assert capfd.readouterr() == ("", "")


def test_a_fork_that_fails_is_told(monkeypatch):
    """Would catch a zygote that ends over it, and every further model with it."""
    from shuteye.engine import zygote

    def no_fork():
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", no_fork)
    ours, theirs = new_pair()
    channel, far_channel = new_pair()
    fds = os.pipe()
    ForkOrder("ipc:///nowhere", far_channel, fds[0], fds[1]).send(ours)
    ours.shutdown(socket.SHUT_WR)
    assert zygote._Zygote(theirs, theirs, lambda: None).serve() is None
    with pytest.raises(OSError, match="fork: Resource"):
        receive_announcement(channel)
    for each in (ours, theirs, channel, far_channel):
        each.close()
    for fd in fds:
        os.close(fd)


def test_a_model_that_needs_torch_is_forked_where_torch_is(zygote, config):
    """Would catch seconds of imports at each wake of such a model; and torch in every engine, had it but one zygote."""
    torch_config = replace(config, kernels="torch")
    obtain_image(Order.of(torch_config, ONE_RANK), no_progress).close()
    native, first, second = (begun(zygote.fork(), one) for one in (config, torch_config, torch_config))
    assert parent_of(native.pid) == zygote.pid
    assert parent_of(first.pid) == parent_of(second.pid) != zygote.pid
    assert "libtorch" not in Path(f"/proc/{native.pid}/maps").read_text()
    os.kill(parent_of(first.pid), signal.SIGKILL)
    third = begun(zygote.fork(), torch_config)
    assert parent_of(third.pid) not in (zygote.pid, parent_of(first.pid))
    for process in (native, first, second, third):
        process.close()
