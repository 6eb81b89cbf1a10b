"""An engine in a process of its own, seen from the asyncio process that started it.

Knows nothing of requests; notices at once when the engine process ends.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import zmq.asyncio

from shuteye.config import EngineConfig
from shuteye.engine.messages import FromEngine, Shutdown, ToEngine
from shuteye.errors import EngineDead, ShuteyeError
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
        self._closing = False
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def pid(self) -> int:
        """The engine process's id."""
        return self._process.pid

    async def start(self) -> None:
        """Start loading; Ready or Failed is the first message."""
        self._directory = Path(tempfile.mkdtemp(prefix="shuteye-"))
        endpoint = f"ipc://{self._directory}/engine"
        self._context = zmq.asyncio.Context()
        self._socket = bind_pair(self._context, endpoint)
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "shuteye.engine.process", endpoint, stdin=asyncio.subprocess.PIPE
        )
        await self._give_config()
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._watch())]

    async def _give_config(self) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        stdin.write(encode(self._config))
        await stdin.drain()
        stdin.close()

    def post(self, message: ToEngine) -> None:
        """Deliver a message to the engine."""
        if not self._closing:
            self._socket.send(encode(message))

    async def close(self) -> None:
        """Stop the engine after its current step; kill it if that takes longer than the grace."""
        self.post(Shutdown())
        self._closing = True
        try:
            await asyncio.wait_for(self._process.wait(), SHUTDOWN_GRACE_S)
        except TimeoutError:
            self._process.send_signal(signal.SIGKILL)
            await self._process.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._socket.close()
        self._context.term()
        shutil.rmtree(self._directory, ignore_errors=True)

    async def _listen(self) -> None:
        while True:
            self._on_message(self._decoder.decode(await self._socket.recv()))

    async def _watch(self) -> None:
        code = await self._process.wait()
        await asyncio.sleep(LAST_WORDS_S)
        if not self._closing:
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            self._on_death(
                EngineDead(f"The engine process ended by {how}; its requests are lost. Restart it or the server.")
            )
