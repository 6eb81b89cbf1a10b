"""An engine in a process of its own, seen from the asyncio process that started it.

Knows nothing of requests; notices at once when the engine process ends.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq.asyncio

from shuteye import logs
from shuteye.config import EngineConfig
from shuteye.engine.messages import FromEngine, Shutdown, ToEngine
from shuteye.engine.surprises import refusal
from shuteye.errors import EngineDead, InvalidRequest, ShuteyeError
from shuteye.executors.wire import Decoder, bind_pair, encode

SHUTDOWN_GRACE_S = 10.0
LAST_WORDS_S = 0.05
"""After the process has ended, how long what it sent last may still be on its way."""


class ProcessLink:
    """Starts the engine process and carries messages; callbacks are called on the event loop."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_message: Callable[[FromEngine], None],
        on_death: Callable[[ShuteyeError], None],
    ) -> None:
        self._config = config
        self._on_message = on_message
        self._on_death = on_death
        self._decoder: Decoder[FromEngine] = Decoder(FromEngine)
        self._checker: Decoder[ToEngine] = Decoder(ToEngine)
        self._process: asyncio.subprocess.Process | None = None
        self._closing = False
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def pid(self) -> int | None:
        """The engine process's id; None until it was started."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Start loading; Ready or Failed follows.

        Raises:
            EngineDead: there is no process to load in.
        """
        self._directory = Path(tempfile.mkdtemp(prefix="shuteye-"))
        endpoint = f"ipc://{self._directory}/engine"
        self._context = zmq.asyncio.Context()
        self._socket = bind_pair(self._context, endpoint)
        logged = logs.settings()
        arguments = (endpoint, str(os.getpid()), logged.format, logged.level)
        command = (sys.executable, "-m", "shuteye.engine.process", *arguments)
        try:
            process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.PIPE)
            if self._closing:
                process.kill()
                raise EngineDead("The engine was closed while its process was being started.")
            self._process = process
            self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._watch(process))]
            await self._give_config(process)
        except OSError as error:
            raise EngineDead(f"The engine process could not be started: {error}.") from error

    async def _give_config(self, process: asyncio.subprocess.Process) -> None:
        stdin = process.stdin
        assert stdin is not None
        stdin.write(encode(self._config))
        await stdin.drain()
        stdin.close()

    def post(self, message: ToEngine) -> None:
        """Deliver a message to the engine.

        Raises:
            InvalidRequest: a value in it cannot be sent, or is of another type than it should be; the engine would end
                over it.
        """
        if self._closing:
            return
        try:
            frame = encode(message)
            self._checker.decode(frame)
        except (msgspec.ValidationError, TypeError) as error:
            raise InvalidRequest(f"A value cannot be sent to the engine: {error}.") from error
        except Exception as error:
            raise refusal(error, "The request") from error
        self._socket.send(frame)

    async def close(self) -> None:
        """Stop the engine after its current step; kill it if that takes longer than the grace."""
        self.post(Shutdown())
        self._closing = True
        if self._process is not None:
            await _end(self._process)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._socket.close()
        self._context.term()
        shutil.rmtree(self._directory, ignore_errors=True)

    async def _listen(self) -> None:
        while True:
            self._on_message(self._decoder.decode(await self._socket.recv()))

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        code = await process.wait()
        await asyncio.sleep(LAST_WORDS_S)
        if not self._closing:
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            self._on_death(
                EngineDead(f"The engine process ended by {how}; its requests are lost. Restart it or the server.")
            )


async def _end(process: asyncio.subprocess.Process) -> None:
    try:
        await asyncio.wait_for(process.wait(), SHUTDOWN_GRACE_S)
    except TimeoutError:
        process.send_signal(signal.SIGKILL)
        await process.wait()
