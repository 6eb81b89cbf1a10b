"""Runs a page of the docs from top to bottom, as a reader would who types what it says.

Knows nothing of what pages say. A fenced block may have a comment in the line before it:
`<!-- not run: why -->`, `<!-- fails -->` (it must), or `<!-- file: NAME -->` (it is saved under that name).
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx2
import openai

from shuteye import LLM

ROOT = Path(__file__).resolve().parents[2]
MODEL = "smollm2-135m"
SHOWN_URL = "http://127.0.0.1:8000"
MADE_SERVER = f"SHUTEYE_SERVER_DEV_MODE=1 shuteye serve {MODEL} --enable-sleep-mode"
"""What `make serve` does."""

TIMEOUT_S = 60.0
CURL = "command curl --silent --show-error --fail-with-body"
STAND_IN = f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'tests' / 'curl.py'))}"
PRELUDE = f'set -euo pipefail\ncurl() {{ {CURL if shutil.which("curl") else STAND_IN} "$@"; }}\n'
_BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)
_RUN = {"sh", "python"}


@dataclass(frozen=True)
class Block:
    """A fenced block, and the comment before it."""

    language: str
    text: str
    mark: str

    @property
    def is_run(self):
        return self.language in _RUN and not self.mark.startswith("not run: ")

    @property
    def file_name(self):
        return self.mark.removeprefix("file: ") if self.mark.startswith("file: ") else None

    @property
    def server_command(self):
        """The command that starts a server, if the block is one."""
        if re.search(r"^make serve\b", self.text, re.MULTILINE):
            return MADE_SERVER
        return self.text if re.search(r"^(\w+=\S+ )*(shuteye serve|serve run)\b", self.text, re.MULTILINE) else None


def blocks_of(page):
    """All fenced blocks of a page, in order."""
    found = _BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(one["language"], one["text"], one["mark"] or "") for one in found]


class Reader:
    """Someone who reads a page and does what it says, with a tiny model in place of the one that it names."""

    def __init__(self, *, checkpoint, cache_dir, directory):
        self._checkpoint, self._cache_dir, self._directory = checkpoint, cache_dir, directory
        self._server = None
        self._url = SHOWN_URL
        self._names = {}
        (directory / "examples").symlink_to(ROOT / "examples")

    def follow(self, page):
        """Do everything."""
        for block in blocks_of(page):
            if block.file_name is not None:
                (self._directory / block.file_name).write_text(self._here(block.text))
            elif block.is_run and block.server_command is not None:
                self._serve(block.server_command)
            elif block.is_run and block.language == "sh":
                self._shell(block)
            elif block.is_run:
                self._python(block, page)

    def _python(self, block, page):
        exec(compile(self._here(block.text), str(page), "exec"), self._names)

    def _here(self, text):
        return text.replace(SHOWN_URL, self._url).replace("/models/trained", str(self._checkpoint))

    def _environment(self):
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SHUTEYE_", "VLLM_"))}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        own = {"SHUTEYE_URL": self._url, "COLUMNS": "200", "CHECKPOINT": str(self._checkpoint)}
        return kept | own | {"PATH": path, "OMP_NUM_THREADS": "1"}  # as conftest.py: no barriers on a busy machine

    def _shell(self, block):
        done = subprocess.run(
            ["bash", "-c", PRELUDE + self._here(block.text)],
            cwd=self._directory,
            env=self._environment(),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        failed = done.returncode != 0
        assert failed == (block.mark == "fails"), f"{block.text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"

    def _serve(self, command):
        """Start the server that `command` starts, on another port and with the tiny model; end the one before."""
        self.close()
        words = shlex.split(command, comments=True)
        start = words.index("serve")
        settings = dict(word.split("=", 1) for word in words[: start - 1])
        flags = [str(self._checkpoint) if word == MODEL else word for word in words[start + 1 :]]
        others = ["--served-model-name", MODEL, "--host", "127.0.0.1", "--port", "0", "--num-threads", "1"]
        log = self._directory / "log"
        with log.open("w") as output:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "shuteye", "serve", *flags, *others, "--cache-dir", str(self._cache_dir)],
                cwd=self._directory,
                env=self._environment() | settings,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._wait_until_ready(log)

    def _wait_until_ready(self, log):
        deadline = time.monotonic() + TIMEOUT_S
        found = None
        while not (found and httpx2.get(f"{found[0]}/ready").status_code == 200):
            assert self._server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
            found = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
        self._url = found[0]

    def close(self):
        """End the server, if one runs, and the clients that the page left open."""
        for value in self._names.values():
            if isinstance(value, openai.OpenAI | LLM):
                value.close()
        self._names.clear()
        if self._server is None:
            return
        self._server.terminate()
        try:
            assert self._server.wait(20) == 0
        finally:
            self._server.kill()
            self._server.wait()
            self._server = None
