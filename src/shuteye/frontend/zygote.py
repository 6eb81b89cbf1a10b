"""The zygote as a server holds it: started, ordered to fork engines, replaced when it has ended.

Imports little, because whoever starts a server imports this first, so that the zygote begins before all else.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

from shuteye.engine.forking import new_pair, received_ends
from shuteye.frontend.engine_process import EngineProcess

END_S = 0.5
"""How long it may take to end; one that still imports is not waited for."""


class Zygote:
    """A running zygote, or one that is started again when an engine is wanted; see `shuteye.engine.zygote`.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self) -> None:
        self._ends: dict[int, int] = {}
        self._start()

    @property
    def pid(self) -> int:
        """Its process id; of one that has ended, what it was."""
        return self._popen.pid

    @property
    def has_ended(self) -> bool:
        """Whether it has ended; what it has forked goes on."""
        return self._popen.poll() is not None

    def fork(self) -> EngineProcess:
        """An engine's process, as soon as the zygote has imported what it needs.

        Raises:
            OSError: the zygote has ended and cannot be started again, or there is nowhere to put the engine's socket.
        """
        if self.has_ended:
            self.replace()
        return EngineProcess(self._control, self.end_of)

    def replace(self) -> None:
        """Start another in the place of one that has ended.

        Raises:
            OSError: it cannot be started.
        """
        self._popen.wait()
        self._collect_ends()
        self._control.close()
        self._start()

    def end_of(self, pid: int) -> int | None:
        """The wait status of a process that was forked, once; None if it runs, or as long as nobody has told."""
        self._collect_ends()
        return self._ends.pop(pid, None)

    def leave_to_parent(self) -> None:
        """In a fork of whoever started it: its end is for the parent to see."""
        self._popen.returncode = 0

    def close(self) -> None:
        """End it; what it has forked goes on. Idempotent."""
        self._collect_ends()
        self._control.close()  # it then reaps whoever has ended, and ends
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(END_S)
        self._popen.kill()
        self._popen.wait()

    def _start(self) -> None:
        ours, theirs = new_pair()
        with theirs, contextlib.ExitStack() as stack:
            stack.callback(ours.close)
            self._popen = subprocess.Popen(
                (sys.executable, "-P", "-m", "shuteye.engine.zygote", str(theirs.fileno()), str(os.getpid())),
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # a terminal's Ctrl-C is for the server alone
                env={"OPENBLAS_NUM_THREADS": "1"} | os.environ,  # numpy's threads, which a fork would not have
            )
            self._control = ours
            stack.pop_all()

    def _collect_ends(self) -> None:
        if self._control.fileno() >= 0:
            self._ends.update(received_ends(self._control))
