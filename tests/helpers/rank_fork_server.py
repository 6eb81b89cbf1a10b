"""Rank processes begun as forks of a process that has imported torch once: a start takes a tenth of the time.

They become children of whoever asks, as those that `RankProcess` starts by itself. Run as a program, this is the
process that forks: each message on its socket is a command line and an environment, and comes with the rank's stdin.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import runpy
import socket
import subprocess
import sys
import time
import traceback

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
LONGEST_MESSAGE = 1 << 16


def adopt_orphans(yes):
    """Whether forks whose own parent has ended become children of this process."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(yes))


class RankForkServer:
    """The process that has imported what ranks need; `spawn` is in the place of `RankProcess.spawn`."""

    def __init__(self):
        adopt_orphans(True)
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, __file__, str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])

    def spawn(self, command):
        """A rank process, as `subprocess.Popen` would have it."""
        stdin, ours = os.pipe()
        message = {
            "command": command[command.index("-m") :][1:],
            "environment": dict(os.environ),
            "parent": os.getpid(),
        }
        socket.send_fds(self._socket, [json.dumps(message).encode()], [stdin])
        os.close(stdin)
        return ForkedRank(int(self._socket.recv(LONGEST_MESSAGE)), open(ours, "wb"))

    def close(self):
        """End; the ranks are their users'."""
        self._socket.close()
        assert self._process.wait(timeout=20) == 0
        adopt_orphans(False)


class ForkedRank:
    """A child that somebody else has forked: what `RankProcess` and tests use of `subprocess.Popen`."""

    def __init__(self, pid, stdin):
        self.pid, self.stdin = pid, stdin
        self.returncode = None

    def poll(self):
        return self._ended(os.WNOHANG)

    def wait(self, timeout=None):
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._ended(0 if timeout is None else os.WNOHANG) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a rank", timeout)
            time.sleep(0.005)
        return self.returncode

    def _ended(self, options):
        if self.returncode is None:
            with contextlib.suppress(ChildProcessError):  # another thread has just waited for it
                pid, status = os.waitpid(self.pid, options)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(9)

    def terminate(self):
        self.send_signal(15)


# --- the process itself -----------------------------------------------------------------------------


def _become_rank(message, stdin, parent):
    while os.getppid() != parent:  # until the fork in between has ended
        time.sleep(0.0005)
    os.setsid()
    os.dup2(stdin, 0)
    os.close(stdin)
    sys.stdin = open(0)  # noqa: SIM115 (as long as the process lives)
    os.environ.clear()
    os.environ.update(message["environment"])
    module, *arguments = message["command"]
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__")


def _fork_rank(message, stdin, told):
    """Fork twice, so that the rank is adopted by whoever wants it; its id goes to `told`."""
    if middle := os.fork():
        os.waitpid(middle, 0)
        return
    if rank := os.fork():
        told.send(str(rank).encode())
        os._exit(0)
    code = 1
    try:
        told.close()
        _become_rank(message, stdin, message["parent"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 (as the interpreter does at the end)
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main():
    """Fork until the socket is closed."""
    import shuteye.executors.rank
    import shuteye.models.decoder
    import shuteye.models.weight_updates
    import shuteye.native.decoder
    import shuteye.tasks.generate.runner  # noqa: F401

    asked = socket.socket(fileno=int(sys.argv[1]))
    while True:
        content, descriptors, _, _ = socket.recv_fds(asked, LONGEST_MESSAGE, 1)
        if not content:
            return
        _fork_rank(json.loads(content), descriptors[0], asked)
        os.close(descriptors[0])


if __name__ == "__main__":
    main()
