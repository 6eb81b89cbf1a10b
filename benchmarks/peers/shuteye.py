"""shuteye itself, from the project's own environment; with sleep mode, or without for comparison."""

from __future__ import annotations

import sys
from pathlib import Path

from checkpoints import Checkpoint
from peers.base import CONTEXT, KV_BYTES
from peers.http_engine import HttpEngine
from shuteye import __version__


class Shuteye(HttpEngine):
    """`shuteye serve`; a request to a sleeping model wakes it, as with the peers."""

    def __init__(self, checkpoint: Checkpoint, logs: Path, *, sleep_mode: bool = True) -> None:
        super().__init__(checkpoint, logs)
        self._sleep_mode = sleep_mode
        self.sleeps = "POST /sleep, level 1" if sleep_mode else None

    def missing(self) -> str | None:
        return None

    def version(self) -> str:
        return f"shuteye {__version__}"

    def arguments(self) -> list[str]:
        flags = ["--dtype", "bfloat16", "--max-model-len", str(CONTEXT), "--kv-cache-memory", f"{KV_BYTES >> 20}MiB"]
        sleeping = ["--enable-sleep-mode", "--dev-mode", "--on-sleeping-request", "wake"] if self._sleep_mode else []
        return [
            sys.executable,
            "-m",
            "shuteye",
            "serve",
            str(self.checkpoint.directory),
            "--offline",
            *flags,
            *sleeping,
        ]

    def command(self) -> str:
        return super().command().replace(f"{sys.executable} -m shuteye", "shuteye")

    def prepare(self) -> None:
        """A first start makes the weight image."""
        try:
            self.start("Once upon a time")
        finally:
            self.stop()

    def sleep(self) -> float:
        return self.timed_call("/sleep?level=1")
