"""A Ray cluster on this machine with Ray Serve in it, and applications asked through its proxy.

Knows nothing of what is tested. Whoever ends it fails if a process outlives it.
"""

import os
import signal
import socket
import time
from pathlib import Path

import httpx2
from shuteye_server import is_running, wait_for

ANSWER_S = 60.0
START_S = 120.0
OBJECT_STORE_BYTES = 80 * 2**20


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def pss_of(pid):
    """Bytes of a process, what it shares with others divided among them."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * int(next(line.split()[1] for line in rollup.splitlines() if line.startswith("Pss:")))


class Cluster:
    """Starts when it is made."""

    def __init__(self, *, num_cpus):
        import ray
        from ray import serve

        self._ray, self._serve = ray, serve
        ray.init(
            address="local",  # never somebody else's
            num_cpus=num_cpus,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            log_to_driver=False,
        )
        self.port = free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": self.port})
        self.apps = []
        self.seen = set()  # ids of all processes of replicas and engines that there ever were

    def run(self, name, settings, *, prefix="/", **options):
        """Deploy an application, or deploy it again with other options; it is ready afterwards."""
        from shuteye.ray.deployment import application

        options = {"health_check_period_s": 1, "graceful_shutdown_wait_loop_s": 0.2} | options
        self._serve.run(application(settings, **options), name=name, route_prefix=prefix)
        app = App(self, name, prefix)
        self.apps.append(app)
        return app

    def delete(self, name):
        """End an application."""
        self._serve.delete(name)

    def close(self):
        """End everything, and see that nothing is left."""
        for app in self.apps:
            app.http.close()
        self._serve.shutdown()
        self._ray.shutdown()
        wait_for(lambda: not any(map(is_running, self.seen)), "the end of all replicas and engines", 20)


class App:
    """One application behind the proxy."""

    def __init__(self, cluster, name, prefix):
        from shuteye.ray.deployment import control_of

        self._cluster, self.name = cluster, name
        base = f"http://127.0.0.1:{cluster.port}{prefix.rstrip('/')}"
        self.http = httpx2.Client(base_url=base, timeout=ANSWER_S)
        self.control = control_of(name)

    def post(self, path, /, **body):
        return self.http.post(path, json=body or None)

    def done(self, path, /, **body):
        """The answer of a call that must succeed."""
        response = self.post(path, **body)
        assert response.status_code == 200, f"{path}: {response.status_code} {response.text}"
        return response.json()

    def state(self):
        response = self.http.get("/state")
        assert response.status_code == 200, response.text
        self._note(response.json())
        return response.json()

    def _note(self, state):
        for pid in self._pids(state).values():
            if is_running(pid):
                self._cluster.seen |= {pid, parent_of(pid)}

    def _pids(self, state):
        return {
            name: each["state"]["ranks"][0]["pid"] for name, each in state["replicas"].items() if each["state"]["ranks"]
        }

    def engines(self):
        """The id of each replica's engine process, by the replica's name."""
        return self._pids(self.state())

    def sleeping(self):
        """Whether each replica sleeps, by its name."""
        return {name: each["is_sleeping"] for name, each in self.state()["replicas"].items()}

    def wait_for_replicas(self, count, *, other_than=()):
        """Return once there are so many, all of them well, and none of those named."""

        def there():
            response = self.http.get("/state")
            if response.status_code != 200:
                return False
            state = response.json()
            names = set(state["replicas"])
            return len(names) == count and not state["failed"] and not names & set(other_than)

        wait_for(there, f"{count} replicas", START_S)
        return self.state()

    def restore(self, count=2):
        """Awake, with so many replicas, whatever a test left."""
        self.wait_for_replicas(count)
        self.done("/wake_up")

    def kill_control(self):
        """End the process of the control as `kill -9` does."""
        title = f"ray::ServeReplica:{self.name}:SleepControl"
        found = [entry for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        pids = [int(entry.name) for entry in found if _title(entry).startswith(title)]
        assert len(pids) == 1, pids
        os.kill(pids[0], signal.SIGKILL)
        wait_for(lambda: not is_running(pids[0]), "the end of the control")
        time.sleep(0.1)


def _title(entry):
    try:
        return (entry / "cmdline").read_bytes().rstrip(b"\0 ").decode(errors="replace").split("\0")[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""
