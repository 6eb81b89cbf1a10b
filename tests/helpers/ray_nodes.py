"""Nodes of a Ray cluster as processes of this machine, in a network namespace if it is to be a machine of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HELPERS = Path(__file__).parent
RAY = Path(sys.executable).parent / "ray"
PORT = 6399
PATIENCE_S = 90


class RayNode:
    """`ray start --block`, with a directory of its own; ended with all that it has started."""

    def __init__(self, *arguments, namespace=None, **environment):
        self.directory = tempfile.mkdtemp(prefix="shr-")  # short: it holds unix sockets
        enter = ("ip", "netns", "exec", namespace) if namespace else ()
        options = ("--object-store-memory=80000000", f"--temp-dir={self.directory}", "--disable-usage-stats")
        variables = {"PYTHONPATH": f"{HELPERS}:{os.environ.get('PYTHONPATH', '')}", "RAY_USAGE_STATS_ENABLED": "0"}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as this)
        self.process = subprocess.Popen(
            (*enter, RAY, "start", "--block", *options, *arguments),
            env=os.environ | variables | environment,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def log(self):
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def wait_until_up(self):
        """Who connects earlier takes a cluster with tokens for one without, for as long as that process lives."""
        deadline = time.monotonic() + PATIENCE_S
        while "Ray runtime started" not in self.log():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.2)
        return self

    def processes(self):
        """Ids of what it has started, itself included: whatever names its directory, or descends from such."""
        found, parents = {self.process.pid}, {}
        for status in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                pid = int(status.parent.name)
                parents[pid] = int(status.read_text().rpartition(")")[2].split()[1])
                if self.directory.encode() in (status.parent / "cmdline").read_bytes():
                    found.add(pid)
        while more := {pid for pid, parent in parents.items() if parent in found and pid not in found}:
            found |= more
        return found

    def kill(self):
        """As if the machine were switched off, but for its connections, which are closed."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def close(self):
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
        self.kill()
        self._log.close()
        shutil.rmtree(self.directory, ignore_errors=True)


def start_head(*, address="127.0.0.1", port=PORT, num_cpus=4, dashboard=False, **environment):
    return RayNode(
        "--head",
        f"--port={port}",
        f"--node-ip-address={address}",
        f"--num-cpus={num_cpus}",
        f"--include-dashboard={str(dashboard).lower()}",
        f"--dashboard-port={port + 1}",
        **environment,
    )


def wait_for_nodes(ray, count):
    """Until so many are up, of a cluster to which this process is connected."""
    deadline = time.monotonic() + PATIENCE_S
    while sum(node["Alive"] for node in ray.nodes()) != count:
        assert time.monotonic() < deadline, f"{ray.nodes()}"
        time.sleep(0.2)


class OtherMachine:
    """A network namespace that is joined to this one by a cable: `HERE` at this end, `address` at the other."""

    HERE = "10.231.7.1"
    address = "10.231.7.2"

    def __init__(self):
        self.name = f"shuteye-{os.getpid()}"
        self.here = self.HERE
        ours, self._theirs = "shuteye-here", "shuteye-there"
        self._ip("netns", "add", self.name)
        try:
            self._ip("link", "add", ours, "type", "veth", "peer", "name", self._theirs, "netns", self.name)
            self._ip("addr", "add", f"{self.here}/24", "dev", ours)
            self._ip("link", "set", ours, "up")
            for words in (("addr", "add", f"{self.address}/24", "dev", self._theirs), ("link", "set", "lo", "up")):
                self._ip("-n", self.name, *words)
            self.plug_in()
        except BaseException:
            self.close()
            raise

    def pull_out(self):
        self._ip("-n", self.name, "link", "set", self._theirs, "down")

    def plug_in(self):
        self._ip("-n", self.name, "link", "set", self._theirs, "up")

    def close(self):
        self._ip("netns", "del", self.name)  # and the cable with it

    @staticmethod
    def _ip(*words):
        subprocess.run(("ip", *words), check=True, capture_output=True)


def can_make_machines():
    """Whether this user may make network namespaces."""
    return os.geteuid() == 0 and shutil.which("ip") is not None
