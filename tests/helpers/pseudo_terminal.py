"""A program with a pseudo-terminal: what it shows, and what is typed."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import time
from contextlib import contextmanager

from shuteye_server import clean_environment, wait_for


class Terminal:
    """A program, and what it has shown since `expect` took the rest."""

    def __init__(self, *command, **environment):
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=clean_environment(TERM="dumb", INPUTRC="/dev/null", **environment),
            start_new_session=True,
        )
        os.close(theirs)
        self.shown = ""

    def expect(self, text, seconds=20.0):
        """Wait for `text`, and take all up to its end."""
        wait_for(lambda: text in self._read(), f"{text!r} after {self.shown!r}", seconds)
        before, _, self.shown = self.shown.partition(text)
        return before

    def _read(self):
        if select.select([self._ours], [], [], 0.05)[0]:
            try:
                self.shown += os.read(self._ours, 65536).decode().replace("\r\n", "\n")
            except OSError:  # the other end is closed
                time.sleep(0.01)
        return self.shown

    def type(self, text):
        os.write(self._ours, text.encode())

    def end(self):
        wait_for(lambda: self._read() is not None and self.process.poll() is not None, "its end")
        os.close(self._ours)
        return self.process.returncode


@contextmanager
def terminal(*command, **environment):
    """Kills what has not ended by itself."""
    opened = Terminal(*command, **environment)
    try:
        yield opened
    finally:
        if opened.process.poll() is None:
            opened.process.kill()
            opened.process.wait()
