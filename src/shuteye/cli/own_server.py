"""A server in a child process, for as long as a command needs it, which nobody else is given the keys of."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import IO, Self

from shuteye.client import Client
from shuteye.errors import ServerError, ServerUnreachable

POLL_S = 0.02
STOP_S = 15.0
"""After which a server that was told to stop is killed."""

_SERVE = """
import sys
from shuteye.processes import die_with_parent
die_with_parent(int(sys.argv.pop(1)))
from shuteye.__main__ import main
main()
"""
"""`python -m shuteye`, which the process that it is told of takes with it however that ends."""

_ADDRESS = re.compile(r"Listening on (http://\S+?)[;\s]")


class OwnServer:
    """`shuteye serve MODEL` on a free port of 127.0.0.1, with sleep mode; a context manager.

    Settings other than where it listens and its keys come from the environment (`SHUTEYE_QUANTIZATION`, …), as for
    `shuteye serve`. Its log is not shown; what it ends with when it fails is in the error.

    Args:
        told: called with each line that the server logs until it is ready.

    Raises:
        ServerError: on entering, the server ended before it was ready; the message is its last one.
    """

    def __init__(self, model: str, *, told: Callable[[str], None] = lambda _line: None) -> None:
        self.api_key, self.admin_api_key = secrets.token_hex(16), secrets.token_hex(16)
        self.url = ""
        self._told = told
        self._model = model
        self._last_line = "it logged nothing"

    def __enter__(self) -> Self:
        flags = ["--host", "127.0.0.1", "--port", "0", "--enable-sleep-mode", "--log-format", "json"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, str(os.getpid()), "serve", self._model, *flags],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "SHUTEYE_API_KEY": self.api_key, "SHUTEYE_ADMIN_API_KEY": self.admin_api_key},
            process_group=0,  # a Ctrl-C of the terminal is ours alone
        )
        assert self._process.stderr is not None
        self._reader = threading.Thread(target=self._read, args=(self._process.stderr,), daemon=True)
        self._reader.start()
        try:
            self._wait_until_ready()
        except BaseException:
            self._stop()
            raise
        self._told = lambda _line: None
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop()

    def _read(self, stderr: IO[str]) -> None:
        for line in stderr:
            message = _message_of(line)
            self._last_line = message
            address = _ADDRESS.search(message)
            if address is not None:
                self.url = address[1]
            self._told(message)

    def _wait_until_ready(self) -> None:
        while not self.url:
            self._check_alive()
            time.sleep(POLL_S)
        with Client(self.url, admin_api_key=self.admin_api_key, timeout_s=STOP_S) as client:
            while not self._is_ready(client):
                time.sleep(POLL_S)

    def _is_ready(self, client: Client) -> bool:
        try:
            return client.ready()
        except ServerUnreachable:
            self._check_alive(ending_s=STOP_S)
            raise

    def _check_alive(self, *, ending_s: float = 0.0) -> None:
        """Raise if it has ended, or ends within `ending_s`."""
        try:
            code = self._process.wait(ending_s)
        except subprocess.TimeoutExpired:
            return
        self._reader.join()
        raise ServerError(f"The server for {self._model!r} ended with status {code}: {self._last_line}")

    def _stop(self) -> None:
        """End it as Ctrl-C would; a second signal does not wait for what still runs."""
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is not None:
                break
            self._process.send_signal(number)
            try:
                self._process.wait(STOP_S / 2)
            except subprocess.TimeoutExpired:
                continue
        self._reader.join()
        if self._process.stderr is not None:
            self._process.stderr.close()


def _message_of(line: str) -> str:
    """Of a line of the JSON log its message, of any other all of it."""
    try:
        return str(json.loads(line)["message"])
    except (ValueError, LookupError, TypeError):
        return line.strip()
