"""What a Ray actor does for a rank, and what is told of it when it ends; without Ray."""

import signal
import threading
import time

import pytest

import shuteye
from shuteye.executors.ray_host import HostOrder, RankHost
from shuteye.executors.ray_ranks import _of_actor


def order(module="this", version=shuteye.__version__):
    return HostOrder(module, b"", version, "text", "info")


@pytest.mark.parametrize(("module", "status"), [("this", 0), ("shuteye.nowhere", 1)])
def test_how_a_process_ended_is_told(module, status):
    """Would catch an actor that outlives its rank and says nothing."""
    assert RankHost().run(order(module)) == f"ended with exit status {status}"


def test_a_process_that_still_loads_can_be_ended():
    host = RankHost()
    host.stop_loading()  # nothing yet
    told = []
    thread = threading.Thread(target=lambda: told.append(host.run(order("timeit"))))
    thread.start()
    while host._process is None:
        time.sleep(0.01)
    host._process.send_signal(signal.SIGSTOP)  # so that it does not end by itself
    host.stop_loading()
    host._process.send_signal(signal.SIGCONT)
    thread.join()
    assert told == ["was ended by SIGTERM"]


def test_another_version_is_refused():
    """Would catch frames that one side takes for something else."""
    assert "shuteye 0.0.1; install the same" in RankHost().run(order(version="shuteye 0.0.1"))


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("The actor died.\n\tpid: 7\nThe actor is dead because it was killed by `ray.kill`.", "was ended through Ray"),
        (
            "The actor died.\nThe actor is dead because its node has died. Some common causes: rain",
            "was ended with its actor, as Ray says: The actor is dead because its node has died.",
        ),
        ("Traceback\n  File x\nModuleNotFoundError: No module named 'shuteye'", "No module named 'shuteye'"),
        ("", "could not be started: RuntimeError"),
    ],
)
def test_what_ray_says_is_told_without_its_advice(said, told):
    assert told in _of_actor(RuntimeError(said))
