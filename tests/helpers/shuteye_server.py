"""`shuteye serve` in a process of its own: started, asked over HTTP, and ended by its id.

Knows nothing of what is tested. A server that ends in any other way than it should fails whoever ends it.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import httpx2
import openai

START_S = 60.0
STOP_S = 20.0
ANSWER_S = 30.0
FORCED = 130
SLEEPING_BODY = (
    b'{"error": {"message": "Model is currently in sleep mode. Please wake it up first with a POST request to '
    b'/wake_up", "type": "ModelSleepingError", "code": 503}}'
)
"""Written out as in the contract, not taken from the code that is tested."""


def wait_for(condition, what, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.01)


def clean_environment(**more):
    """This process's environment without settings of whoever runs the tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SHUTEYE_", "VLLM_"))}
    return kept | {"COLUMNS": "200"} | more


def shuteye(*arguments, **environment):
    """Run one command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "shuteye", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env=clean_environment(**environment),
    )


def is_running(pid):
    """True if a process has this id and is more than a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def children_of(pid):
    """Ids of the processes that `pid` started and that still run."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            stat = (entry / "stat").read_text() if entry.name.isdigit() else ""
        except (FileNotFoundError, ProcessLookupError):
            continue
        if stat and stat.rpartition(")")[2].split()[1] == str(pid):
            found.append(int(entry.name))
    return [child for child in found if is_running(child)]


def engines_below(pid):
    """Engines that a zygote has forked, or one with torch that it has forked."""
    engines = []
    for child in children_of(pid):
        name = Path(f"/proc/{child}/comm").read_text().strip()
        engines += [child] if name == "shuteye-engine" else engines_below(child)
    return engines


class Served:
    """A server of `model`; listens on 127.0.0.1 at a port that the system chose."""

    def __init__(self, model, *flags, cache_dir, policy="reject", keys=(), **environment):
        self.model = str(model)
        self.policy = policy
        self._told = False
        self.started = time.monotonic()
        self.may_end_with = 0
        self.api_key, self.admin_key = keys or (None, None)
        self._scratch = tempfile.TemporaryDirectory(prefix="e2e-")  # short: a socket's path must fit in 107 bytes
        self._temporary = Path(self._scratch.name, "tmp")
        self._temporary.mkdir()
        torchs = Path(self._scratch.name, "torch")  # where a conversion has torch make a directory, to stay
        environment = {"TORCHINDUCTOR_CACHE_DIR": str(torchs)} | environment
        self._log = Path(self._scratch.name, "log")
        keyed = ("--api-key", self.api_key, "--admin-api-key", self.admin_key) if keys else ()
        policies = ("--on-sleeping-request", policy)
        where = ("--cache-dir", str(cache_dir)) if cache_dir else ()
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "shuteye",
                    "serve",
                    self.model,
                    "--port",
                    "0",
                    *where,
                    *policies,
                    *keyed,
                    *flags,
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=clean_environment(TMPDIR=str(self._temporary), **environment),
            )
        self.http = None

    def wait_until_ready(self):
        """Return once requests are served."""
        pattern = re.compile(r"Listening on (http://127\.0\.0\.1:\d+)")
        self._wait(lambda: pattern.search(self.log), "listening")
        self.url = pattern.search(self.log)[1]
        headers = {"Authorization": f"Bearer {self.admin_key}"} if self.admin_key else {}
        self.http = httpx2.Client(base_url=self.url, headers=headers, timeout=ANSWER_S)
        self._wait(lambda: self.get("/ready").status_code == 200, "getting ready")
        (self.zygote_pid,) = children_of(self.process.pid)
        self.engine_pid, *_others = engines_below(self.zygote_pid)
        return self

    def _wait(self, condition, what):
        def happened():
            assert self.process.poll() is None, f"the server ended while {what}:\n{self.log}"
            return condition()

        wait_for(happened, what, START_S)

    @property
    def log(self):
        """All that the server has printed."""
        return self._log.read_text()

    # --- asking -----------------------------------------------------------------------------------

    def get(self, path):
        return self.http.get(path)

    def post(self, path, /, **body):
        return self.http.post(path, json=body or None)

    def done(self, path, /, **body):
        """The answer of a control call that must succeed."""
        response = self.post(path, **body)
        assert response.status_code == 200, f"{path}: {response.status_code} {response.text}"
        return response.json()

    def refused(self, path, /, **body):
        """Status, type and message of a call that must fail."""
        response = self.post(path, **body)
        assert response.status_code >= 400, f"{path} answered {response.status_code} {response.text}"
        error = response.json()["error"]
        assert error["code"] == response.status_code
        return response.status_code, error["type"], error["message"]

    def request(self, prompt, *, max_tokens=16, **more):
        """The body of a greedy completion that does not end before `max_tokens`."""
        fixed = {"model": self.model, "temperature": 0, "ignore_eos": True}
        return fixed | {"prompt": prompt, "max_tokens": max_tokens} | more

    def complete(self, prompt, **more):
        """The text of a completion that must succeed."""
        return self.done("/v1/completions", **self.request(prompt, **more))["choices"][0]["text"]

    def metric(self, name, **labels):
        """The sum of a metric over all series with these labels; 0 if there are none."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        lines = [line for line in self.get("/metrics").text.splitlines() if re.match(rf"{name}[{{ ]", line)]
        return sum(float(line.rpartition(" ")[2]) for line in lines if all(label in line for label in wanted))

    def openai(self, **options):
        """The openai client; it sends every request once."""
        key = self.api_key or "none"
        return openai.OpenAI(**({"base_url": f"{self.url}/v1", "api_key": key, "max_retries": 0} | options))

    def async_openai(self, **options):
        """The openai client for asyncio; it sends every request once."""
        key = self.api_key or "none"
        return openai.AsyncOpenAI(**({"base_url": f"{self.url}/v1", "api_key": key, "max_retries": 0} | options))

    # --- ending -----------------------------------------------------------------------------------

    def restore(self):
        """Awake, not paused, nothing in flight, whatever a test left."""
        self.done("/sleep?level=2&mode=abort")
        self.done("/wake_up")
        self.done("/resume")
        assert self.get("/ready").status_code == 200

    def ended(self, within_s=STOP_S):
        """The exit status of a server that has been told to stop."""
        try:
            return self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"the server did not stop within {within_s} s:\n{self.log[-3000:]}") from None

    def tell(self, number):
        """Send a signal, if it still runs."""
        if self.process.poll() is None:
            self._told = True
            self.process.send_signal(number)

    def kill(self):
        """End the server as `kill -9` does; it leaves nothing behind all the same."""
        self._told, self.may_end_with = True, -signal.SIGKILL
        self.process.kill()
        self.process.wait()

    def stop(self):
        """End the server, if it still runs, and see that it leaves nothing behind."""
        if not self._told:
            self.tell(signal.SIGTERM)
        try:
            expected = FORCED if "Second signal" in self.log else self.may_end_with
            assert self.ended() == expected, self.log[-3000:]
            assert not self.http or not is_running(self.engine_pid), "the engine outlived its server"
            assert [file.name for file in self._temporary.iterdir()] == [], "temporary files are left"
            assert "Traceback" not in self.log, self.log[self.log.index("Traceback") - 1000 :]
        finally:
            if self.http:
                self.http.close()
            self._scratch.cleanup()


def stop_all(servers):
    """Stop every server, even if one of them fails to."""
    for server in servers:
        server.tell(signal.SIGTERM)
    with ExitStack() as stack:
        for server in servers:
            stack.callback(server.stop)
