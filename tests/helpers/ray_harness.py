"""A core over ranks of a Ray cluster, and what Ray tells of them."""

import json
import os
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

import pytest
from rank_harness import RankHarness
from ray_nodes import RAY

from shuteye.engine.core import EngineCore
from shuteye.executors import open_executor
from shuteye.executors.ray_ranks import RayRank

GONE_S = 20.0


class RayHarness(RankHarness):
    """A core over ranks of a Ray cluster, which fail where they are told to."""

    def pid(self, rank):
        """Of the rank's process, of which the actor is the parent."""
        return self.core.state.ranks[rank].pid

    def kill(self, rank, number=signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.kill(self.pid(rank), number)

    def actor_pid(self, rank):
        return parent_of(self.pid(rank))

    def machine(self, rank):
        return self.executor._processes[rank].machine.address


@contextmanager
def ray_driver(address):
    """What this process and those it starts need of a cluster with tokens; gives what connects, once that is up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", token_hex(32))
        patch.setenv("RAY_ADDRESS", address)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setattr(RayRank, "module", "faulty_rank")

        @contextmanager
        def connect():
            import ray

            ray.init(logging_level="warning")
            yield ray
            ray.shutdown()

        yield connect


@contextmanager
def opening(config, faults):
    """Gives what opens ranks of a layout, which find their faults in a directory; they end with this context."""
    executors = []

    def open_them(layout, **options):
        wanted = config(layout, distributed_executor_backend="ray", **options)
        executors.append(open_executor(wanted))
        harness = RayHarness(EngineCore(wanted, executors[-1]), None)
        harness.faults = faults
        return harness

    try:
        yield open_them
    finally:
        for executor in executors:
            executor.close()


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def is_alive(pid):
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def until(condition, within_s=GONE_S):
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def living_actors():
    """Names, as `ray list actors` tells."""
    command = (RAY, "list", "actors", "--format=json", "--filter", "state=ALIVE", "--limit=1000")
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    return sorted(actor["name"] for actor in json.loads(listed.stdout))
