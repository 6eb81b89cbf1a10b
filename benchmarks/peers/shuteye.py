"""shuteye itself, from the project's own environment; with sleep mode, or without for comparison."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from checkpoints import Checkpoint
from peers.base import CONTEXT, KV_BYTES
from peers.http_engine import HttpEngine
from shuteye import __version__
from shuteye.config import default_cache_dir

BEFORE = "SHUTEYE_BEFORE"
"""Names another checkout, whose native library has been built: what `shuteye-before` serves with."""


class Shuteye(HttpEngine):
    """`shuteye serve`; a request to a sleeping model wakes it, as with the peers.

    Quantized formats are served from the GGUF file that llama.cpp serves.

    Args:
        source: the `src` of another checkout.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        logs: Path,
        level: str | None = None,
        *,
        sleep_mode: bool = True,
        source: Path | None = None,
    ) -> None:
        super().__init__(checkpoint, logs, level)
        self._sleep_mode = sleep_mode
        self._source = source
        self.sleeps = "POST /sleep, level 1" if sleep_mode else None

    def missing(self) -> str | None:
        if self._source is not None and not (self._source / "shuteye").is_dir():
            return f"{self._source} has no package shuteye; set {BEFORE} to the other checkout."
        return None

    def version(self) -> str:
        return f"shuteye {__version__}"

    @property
    def served(self) -> Path:
        return self.checkpoint.directory if self.checkpoint.format == "bf16" else self.checkpoint.gguf

    def arguments(self) -> list[str]:
        flags = ["--dtype", "bfloat16", "--max-model-len", str(CONTEXT), "--kv-cache-memory", f"{KV_BYTES >> 20}MiB"]
        kernels = ["--kernels", self.level] if self.level else []
        sleeping = ["--enable-sleep-mode", "--dev-mode", "--on-sleeping-request", "wake"] if self._sleep_mode else []
        path = [] if self._source is None else ["env", f"PYTHONPATH={self._source}"]
        return [
            *path,
            sys.executable,
            "-m",
            "shuteye",
            "serve",
            str(self.served),
            "--offline",
            *flags,
            *kernels,
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

    def disk_bytes(self) -> int:
        """Its weight image's, found by what it has mapped."""
        images = default_cache_dir() / "images"
        return sum(path.stat().st_size for path in self.process.mapped_files() if path.is_relative_to(images))

    def sleep(self) -> float:
        return self.timed_call("/sleep?level=1")


def before(checkpoint: Checkpoint, logs: Path, level: str | None) -> Shuteye:
    """shuteye as another checkout has it, to compare two of them: `side_by_side.py shuteye shuteye-before`."""
    return Shuteye(checkpoint, logs, level, source=Path(os.environ.get(BEFORE, ".")).resolve() / "src")
