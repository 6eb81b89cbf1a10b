"""One process of an engine and all that it started: spawned, weighed, ended, with its output kept in a log.

Knows nothing of what the process does.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from peers.base import EngineFailure

STOP_TIMEOUT_S = 10.0
UNWANTED = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "KMP_AFFINITY", "GOMP_SPINCOUNT")
"""Variables of whoever measures that would change what is measured."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1", "VLLM_NO_USAGE_STATS": "1"}

_PSS = re.compile(rb"^Pss:\s+(\d+) kB", re.MULTILINE)


def ending_engines(main: Callable[[], None]) -> None:
    """Run a benchmark so that Ctrl-C and SIGTERM reach its `finally`, where it ends what it started, and are told."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Terminated; every engine that ran was ended."))
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Interrupted; every engine that ran was ended.")


class Process:
    """A running process in a group of its own, so that Ctrl-C ends it through `stop` and not before."""

    def __init__(
        self, command: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None, pipe: bool = False
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        inherited = {name: value for name, value in os.environ.items() if name not in UNWANTED}
        stream = subprocess.PIPE if pipe else None
        with log.open("ab") as output:
            output.write(f"$ {' '.join(command)}\n".encode())
            output.flush()
            self.popen = subprocess.Popen(
                command,
                stdin=stream or subprocess.DEVNULL,
                stdout=stream or output,
                stderr=output,
                env=inherited | OFFLINE | dict(environment or {}),
                start_new_session=True,
            )

    def check_alive(self) -> None:
        """Raises:
        EngineFailure: it has ended, with the last line of its log.
        """
        if self.popen.poll() is not None:
            status, words = self.popen.returncode, self._last_words()
            raise EngineFailure(f"ended with status {status}: {words} (see {self.log.name})")

    def tree(self) -> list[int]:
        """Its pid and those of all its descendants that are alive."""
        found = [self.popen.pid]
        for pid in found:
            found += _children(pid)
        return found

    def mapped_files(self) -> set[Path]:
        """Files that any process of the tree has mapped."""
        return {Path(name) for pid in self.tree() for name in _mapped_names(pid)}

    def memory_bytes(self) -> int:
        """Proportional set size of the tree: shared pages count once, divided among those who map them."""
        return sum(map(_pss_bytes, self.tree()))

    def stop(self) -> None:
        """Ask it to end, then end it and what is left of its descendants."""
        tree = self.tree() if self.popen.poll() is None else []
        self.popen.terminate()
        try:
            self.popen.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
        for pid in tree[1:]:
            _kill(pid, group=self.popen.pid)
        for stream in (self.popen.stdin, self.popen.stdout):
            if stream is not None:
                stream.close()

    def _last_words(self) -> str:
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        telling = [line for line in lines if "error" in line.lower() and "://" not in line]
        return (telling or lines or ["no output"])[-1][:200]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(deadline_s: float) -> None:
    """Sleep a little, or until the deadline."""
    time.sleep(max(0.0, min(0.005, deadline_s - time.perf_counter())))


def _children(pid: int) -> list[int]:
    """Children of every thread of a process; nothing if it has gone."""
    try:
        texts = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [int(child) for text in texts for child in text.split()]


def _pss_bytes(pid: int) -> int:
    try:
        found = _PSS.search(Path(f"/proc/{pid}/smaps_rollup").read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(found[1]) * 1024 if found else 0


def _mapped_names(pid: int) -> list[str]:
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [fields[5] for line in lines if len(fields := line.split(maxsplit=5)) == 6 and fields[5].startswith("/")]


def _kill(pid: int, *, group: int) -> None:
    """End a descendant, unless its pid means another process by now (descendants keep the session they began in)."""
    try:
        if os.getsid(pid) == group:
            os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
