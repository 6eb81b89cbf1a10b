"""The actor that Ray starts for each rank: it hosts the rank's process on its machine, and tells how that ended.

Knows nothing of Ray, nor of what the rank is asked: that goes over sockets of the process' own. No torch.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from dataclasses import dataclass

import shuteye
from shuteye.executors.rank_process import how_ended


@dataclass(frozen=True, slots=True)
class HostOrder:
    """What an actor is to run.

    Attributes:
        module: what the process runs.
        start: a `Start`, encoded.
        version: of shuteye in the engine.
    """

    module: str
    start: bytes
    version: str
    log_format: str
    log_level: str


class RankHost:
    """Runs one process, which dies with this one, whatever ends that."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, order: HostOrder) -> str:
        """Start the process; once it has ended, how it did, or why it was not started."""
        if shuteye.__version__ != order.version:
            return (
                f"could not be started: shuteye {shuteye.__version__} is installed there, and the engine is "
                f"{order.version}; install the same"
            )
        command = (sys.executable, "-m", order.module, "-", str(os.getpid()), order.log_format, order.log_level)
        try:
            self._process = process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        except OSError as error:
            return f"could not be started: {error}"
        with contextlib.suppress(OSError):  # Ray's workers are nice, and starve beside others; not all may undo it
            os.setpriority(os.PRIO_PROCESS, process.pid, 0)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
            stdin.write(order.start)
        return how_ended(process.wait())

    def stop_loading(self) -> None:
        """Tell the process to end, which one that has loaded does not heed."""
        if self._process is not None:
            self._process.terminate()
