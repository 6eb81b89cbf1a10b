"""One server in a world of its own, whose disk, temporary files, clock and processes can be broken and counted.

Knows nothing of requests or of what is right.
"""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2

DISK_BYTES = 160 << 20
"""Size of the tmpfs that holds images and spill files: what a build wants to see free, twice."""

START_S = 120.0
END_S = 60.0
HANG_S = 3.0
KEY = "chaos-admin"
MARK = "SHUTEYE_TEST_CHAOS"


class Violation(Exception):
    """The server did what it must never do."""


def wait_for(condition: Callable[[], bool], what: str, seconds: float) -> None:
    """Poll until `condition` holds.

    Raises:
        Violation: it did not within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise Violation(f"{what} did not happen within {seconds:g} s")
        time.sleep(0.05)


class World:
    """A directory with a small disk, a clock, and at most one server.

    Args:
        directory: empty; owned by this object.
        checkpoint: what the server serves.
    """

    def __init__(self, directory: Path, checkpoint: Path) -> None:
        self.directory = directory
        self.checkpoint = checkpoint
        self.disk, self.tmp, self.home = (directory / name for name in ("disk", "tmp", "home"))
        self.log = directory / "server.log"
        self.id = uuid.uuid4().hex
        self.url = ""
        self.server: subprocess.Popen[bytes] | None = None
        self._shared_before = set(os.listdir("/dev/shm"))
        for path in (self.disk, self.tmp, self.home):
            path.mkdir()
        self._mount("-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(self.disk))
        self._clock = directory / "clock"
        self._clock.write_bytes(struct.pack("q", 0))
        self._clock_library = directory / "clock.so"
        source = Path(__file__).parent / "clock.c"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", self._clock_library, source, "-ldl"], check=True)

    # --- the server -----------------------------------------------------------------------------

    def start(self, *flags: str) -> None:
        """Start a server and wait until it is healthy; `/ready` is another matter.

        Raises:
            Violation: it ended, or is not healthy in time.
        """
        log_from = self.log.stat().st_size if self.log.exists() else 0
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SHUTEYE_")} | {
            "HOME": str(self.home),
            "TMPDIR": str(self.tmp),
            "XDG_RUNTIME_DIR": str(self.tmp),
            "LD_PRELOAD": str(self._clock_library),
            "CHAOS_CLOCK": str(self._clock),
            MARK: self.id,
        }
        command = [sys.executable, "-m", "shuteye", "serve", str(self.checkpoint), "--enable-sleep-mode"]
        command += ["--admin-api-key", KEY, "--port", "0", "--cache-dir", str(self.disk / "cache")]
        command += ["--dtype", "float32", "--kv-cache-memory", "4MiB", "--max-model-len", "512", "--num-threads", "1"]
        command += ["--hang-timeout-s", str(HANG_S), "--engine-restarts", "1000", "--engine-restart-delay-s", "0.1"]
        with self.log.open("ab") as log:
            self.server = subprocess.Popen([*command, *flags], stdout=log, stderr=log, env=environment)
        self.url = ""
        wait_for(lambda: self._is_up(log_from), "the start of the server", START_S)

    def _is_up(self, log_from: int) -> bool:
        assert self.server is not None
        if self.server.poll() is not None:
            raise Violation(f"the server ended while starting, with status {self.server.returncode}")
        if not self.url:
            for line in self.log.read_bytes()[log_from:].decode(errors="replace").splitlines():
                if "http://127.0.0.1:" in line:
                    self.url = "http://127.0.0.1:" + line.split("http://127.0.0.1:")[1].split()[0].rstrip("/.,;")
        return bool(self.url) and self.health() == 200

    def health(self) -> int:
        """The status of `/health`; 0 if nobody answers."""
        try:
            return httpx2.get(f"{self.url}/health", timeout=5).status_code
        except httpx2.HTTPError:
            return 0

    @property
    def engine_pid(self) -> int | None:
        """The engine process, if there is one."""
        for pid in self.processes():
            with contextlib.suppress(OSError):
                if b"shuteye.engine.process" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
        return None

    def kill_server(self) -> None:
        """SIGKILL, after which nothing may be left of it, its engine included."""
        assert self.server is not None
        self.server.kill()
        self.server.wait()
        self.require_nothing_left()

    def end_server(self) -> None:
        """SIGTERM; the exit status must be that of a clean end."""
        assert self.server is not None
        self.server.send_signal(signal.SIGTERM)
        try:
            status = self.server.wait(END_S)
        except subprocess.TimeoutExpired as error:
            raise Violation(f"the server did not end within {END_S:g} s of SIGTERM") from error
        if status != 0:
            raise Violation(f"the server ended with status {status} after SIGTERM")
        self.require_nothing_left()

    # --- what is left ---------------------------------------------------------------------------

    def processes(self) -> list[int]:
        """Every process that the server started, itself included, by a mark in its environment."""
        mark, found = f"{MARK}={self.id}".encode(), []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        return found

    def require_nothing_left(self) -> None:
        """No process, no temporary file, nothing in shared memory, no half-made image.

        Raises:
            Violation: names what is left.
        """
        wait_for(lambda: not self.processes(), f"the end of all processes ({self.processes()})", 10)
        left = [str(path) for path in self.tmp.rglob("*")]
        left += [f"/dev/shm/{name}" for name in sorted(set(os.listdir("/dev/shm")) - self._shared_before)]
        left += [str(path) for path in self.disk.rglob("*") if path.name.startswith(".") and path.is_file()]
        left = [path for path in left if not path.endswith(".lock")]
        if left:
            raise Violation(f"left behind: {', '.join(left)}")

    # --- disk and clock -------------------------------------------------------------------------

    @property
    def images(self) -> list[Path]:
        """The files of weights of every finished image."""
        return sorted(path for path in self.disk.rglob("*") if path.is_file() and path.stat().st_size > 100_000)

    @contextlib.contextmanager
    def full_disk(self) -> Iterator[None]:
        """Nothing more can be written."""
        filler = self.disk / "filler"
        with filler.open("wb") as file, contextlib.suppress(OSError):
            while True:
                file.write(b"x" * 65536)
                file.flush()
        try:
            yield
        finally:
            filler.unlink()

    @contextlib.contextmanager
    def read_only_disk(self) -> Iterator[None]:
        """The disk can only be read, for servers that start meanwhile."""
        self._mount("-o", "remount,ro", str(self.disk))
        try:
            yield
        finally:
            self._mount("-o", "remount,rw", str(self.disk))

    def set_clock(self, shift_s: int) -> None:
        """Let the server's wall clock jump to `shift_s` from the true time."""
        with self._clock.open("r+b") as file:
            file.write(struct.pack("q", shift_s))

    def _mount(self, *arguments: str) -> None:
        subprocess.run(["mount", *arguments], check=True)

    def close(self) -> None:
        """End whatever still runs and give the disk back."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.server is not None:
            self.server.wait()
        subprocess.run(["umount", "--lazy", str(self.disk)], check=True)
