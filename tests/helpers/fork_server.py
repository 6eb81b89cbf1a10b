"""Programs that begin with a second of imports, begun as forks of a process that has imported all of it once.

Run as a program, it is that process: each message on its socket is a program, and comes with two descriptors: one for
what the program prints, one on which its id is told, and then how it ended.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys

LONGEST_PROGRAM = 1 << 16


class ForkServer:
    """The process that has imported `modules`."""

    def __init__(self, *modules):
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-W", "error", __file__, str(theirs.fileno()), *modules]
        with theirs:
            self._process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])

    def begin(self, source):
        """A process that runs this program."""
        output, their_output = os.pipe()
        told, their_told = os.pipe()
        socket.send_fds(self._socket, [source.encode()], [their_output, their_told])
        os.close(their_output)
        os.close(their_told)
        return Fork(open(output, encoding="utf-8"), open(told, "rb", buffering=0))

    def close(self):
        """End; no fork may be left."""
        self._socket.close()
        assert self._process.wait(timeout=20) == 0


class Fork:
    """A process of the server's, as `subprocess.Popen` has it."""

    def __init__(self, stdout, told):
        self.stdout, self._told = stdout, told
        self.pid = int(told.readline())
        self.returncode = None

    def poll(self):
        return self._ended(0)

    def wait(self, timeout):
        assert self._ended(timeout) is not None, f"{self.pid} did not end within {timeout} s"
        return self.returncode

    def _ended(self, timeout):
        if self.returncode is None and select.select([self._told], [], [], timeout)[0]:
            self.returncode = os.waitstatus_to_exitcode(int(self._told.readline()))
            self._told.close()
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def main(control, modules):
    for module in modules:
        __import__(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        source, descriptors, _flags, _address = socket.recv_fds(control, LONGEST_PROGRAM, 2)
        if not source:
            return None
        if os.fork() == 0:
            control.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return keep(source, *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def keep(source, output, told):
    """Between the server and a program: waits for its end. Returns the program in the process that is to run it."""
    pid = os.fork()
    if pid == 0:
        os.close(told)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        return source
    os.close(output)
    os.write(told, b"%d\n" % pid)
    _pid, status = os.waitpid(pid, 0)
    with contextlib.suppress(BrokenPipeError):
        os.write(told, b"%d\n" % status)
    os._exit(0)


if __name__ == "__main__" and (program := main(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])) is not None:
    exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
