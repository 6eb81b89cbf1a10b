"""docs/guides/ray-serve.md, followed by a reader who types all of it, with a cluster for each application."""

import subprocess
import sys
import time

import httpx2
import pytest
from docs_reader import MODEL, ROOT, SHOWN_URL, Reader
from serve_cluster import free_port

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

START_S = 120.0
STOP_S = 60.0


class RayReader(Reader):
    """Runs applications and Python in processes of their own, each with a cluster that nobody else is in."""

    def __init__(self, **where):
        super().__init__(**where)
        self._port = free_port()
        self._url = f"http://127.0.0.1:{self._port}"

    def _here(self, text):
        """With the tiny model under the name of the one that the page serves, and on a port that is free."""
        model = f"model: {self._checkpoint}\n      served_model_name: [{MODEL}]\n      cache_dir: {self._cache_dir}"
        text = text.replace(f"model: {MODEL}", model).replace("port: 8000", f"port: {self._port}")
        text = text.replace(f'"model": "{MODEL}", "kv', f'"model": "{self._checkpoint}", "kv')
        return text.replace(SHOWN_URL, self._url)

    def _environment(self):
        return super()._environment() | {"RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0"}

    def _serve(self, command):
        self.close()
        log = self._directory / "log"
        with log.open("w") as output:
            self._server = subprocess.Popen(
                ["bash", "-c", f"exec {command}"],
                cwd=self._directory, env=self._environment(), stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        deadline = time.monotonic() + START_S
        while not self._is_ready():
            assert self._server.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.5)

    def _is_ready(self):
        try:
            return httpx2.get(f"{self._url}/ready").status_code == 200
        except httpx2.TransportError:
            return False

    def _python(self, block, page):
        self.close()
        done = subprocess.run(
            [sys.executable, "-c", self._here(block.text)],
            cwd=self._directory, env=self._environment(), capture_output=True, text=True, timeout=START_S,
        )  # fmt: skip
        assert done.returncode == 0, f"{block.text}\n{done.stderr[-4000:]}"

    def close(self):
        """End the application, if one runs, as Ctrl-C does."""
        if self._server is None:
            return
        self._server.terminate()
        try:
            self._server.wait(STOP_S)
        finally:
            self._server.kill()
            self._server.wait()
            self._server = None


def test_the_page_works_from_top_to_bottom(tiny_checkpoint, core_cache, tmp_path):
    """A setting, a call or an address that does not do what the page says."""
    reader = RayReader(checkpoint=tiny_checkpoint, cache_dir=core_cache, directory=tmp_path)
    try:
        reader.follow(ROOT / "docs" / "guides" / "ray-serve.md")
    finally:
        reader.close()
