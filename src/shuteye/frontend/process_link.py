"""An engine in a process of its own, seen from the asyncio process that started it.

Knows nothing of requests; notices at once when the engine process ends, and soon when it hangs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
import weakref
from collections.abc import Callable
from typing import Any

import msgspec
import zmq.asyncio

from shuteye import logs
from shuteye import processes as descriptors
from shuteye.config import EngineConfig
from shuteye.engine.liveness import LOOK_S, HangWatch
from shuteye.engine.messages import Connected, FromEngine, Ready, Shutdown, ToEngine
from shuteye.engine.start import EngineStart
from shuteye.errors import DescriptorsExhausted, EngineDead, InvalidRequest, ShuteyeError, refusal
from shuteye.executors.wire import bind_pair
from shuteye.frontend.engine_process import EngineProcess
from shuteye.frontend.forks import tell_forks
from shuteye.frontend.zygote import Zygote
from shuteye.typed_frames import Decoder, encode

logger = logging.getLogger(__name__)

SHUTDOWN_GRACE_S = 10.0
NUM_DESCRIPTORS = 32
"""Needed for a start, and then some; out of them, ZeroMQ ends the whole process (`errno_assert`)."""
LAST_WORDS_S = 0.05
"""After the process has ended, how long what it sent last may still be on its way."""
NUM_LOOKS = 20
"""So often, and so far apart, it is looked for what its zygote says of its end."""


class ProcessLink:
    """Starts the engine process and carries messages; callbacks are called on the event loop.

    Args:
        zygote: of whom the process is forked; None makes one for this link alone.
        process: one that has been forked, and that somebody else tells what to serve; ended here like any other.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_message: Callable[[FromEngine], None],
        on_death: Callable[[ShuteyeError], None],
        zygote: Zygote | None = None,
        process: EngineProcess | None = None,
    ) -> None:
        self._config = config
        self._zygote = zygote
        self._own_zygote: Zygote | None = None
        self._on_message = on_message
        self._on_death = on_death
        self._decoder: Decoder[FromEngine] = Decoder(FromEngine)
        self._checker: Decoder[ToEngine] = Decoder(ToEngine)
        self._process = process
        self._ended = asyncio.Event()
        self._closing = False
        self._listens = False  # to us: it does not while it loads
        self._hang: str | None = None
        self._opened: weakref.finalize[..., Any] | None = None  # closes what is open, if only with this link
        self._tasks: list[asyncio.Task[None]] = []
        self.inherited = False
        tell_forks(self)

    @property
    def pid(self) -> int | None:
        """The engine process's id; None until it has announced itself."""
        return self._process.pid if self._process else None

    @property
    def hang(self) -> str | None:
        """Why the engine counts as hung; None while it does not. It may go on by itself."""
        return self._hang

    async def start(self) -> None:
        """Start loading; Ready or Failed follows.

        Raises:
            DescriptorsExhausted: there are too few left to start a process.
            EngineDead: there is no process to load in.
        """
        told = self._process is not None
        process = self._open()
        if not told:
            process.tell(encode(EngineStart(self._config, logs.settings())))
        work = (self._listen(process), self._watch(process), self._watch_pulse(process))
        self._tasks = [asyncio.create_task(one) for one in work]

    def _open(self) -> EngineProcess:
        """Make everything that the two processes share, and the process, unless it is there already."""
        if not descriptors.are_left(NUM_DESCRIPTORS):
            raise _not_started(None)
        with contextlib.ExitStack() as stack:
            try:
                self._process = process = self._process or self._forked(stack)
                stack.callback(process.close)
                self._context = zmq.asyncio.Context()
                stack.callback(self._context.term)
                self._socket = bind_pair(self._context, process.endpoint)
                stack.callback(self._socket.close)
            except (OSError, zmq.ZMQError) as error:
                self._process = None
                raise _not_started(error) from error
            # a ZeroMQ context that is collected before its sockets are closed waits for them for ever
            self._opened = weakref.finalize(self, stack.pop_all().close)
        return process

    def _forked(self, stack: contextlib.ExitStack) -> EngineProcess:
        if self._zygote is None:
            self._zygote = self._own_zygote = Zygote()
            stack.callback(self._own_zygote.close)
        return self._zygote.fork()

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
        """Stop the engine after its current step; kill it if that takes longer than the grace, or if it hangs."""
        if self.inherited:
            return
        process = self._process
        if process is not None and not self._ended.is_set():
            if self._listens:
                self.post(Shutdown())
            else:
                process.send_signal(signal.SIGTERM)  # it stops loading, and leaves nothing half-written
        self._closing = True
        if process is not None and process.pid is not None:
            await self._end(process, SHUTDOWN_GRACE_S if self._hang is None else 0.0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._opened is not None:
            self._opened()

    async def _end(self, process: EngineProcess, grace_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), grace_s)
        process.send_signal(signal.SIGKILL)  # ends a stopped process, too
        await self._ended.wait()
        asyncio.get_running_loop().remove_reader(process.ended_fd)

    def leave_to_parent(self, reason: EngineDead) -> None:
        """See `forks.Inherited`: process, socket and the event loop that watches them are the parent's."""
        self.inherited = True
        if self._opened is not None:
            self._opened.detach()
        if self._process is not None:
            self._process.leave_to_parent()
        if self._own_zygote is not None:
            self._own_zygote.leave_to_parent()

    async def _listen(self, process: EngineProcess) -> None:
        while True:
            message = self._decoder.decode(await self._socket.recv())
            if isinstance(message, Connected):
                process.met()
                continue
            self._listens = self._listens or isinstance(message, Ready)
            self._on_message(message)

    async def _watch_pulse(self, process: EngineProcess) -> None:
        watch = HangWatch(process.pulse, self._config.hang_timeout_s, self._config.step_timeout_s)
        while not self._ended.is_set():  # a dead engine does not hang
            found = watch.look(time.monotonic())
            if found is not None and self._hang is None:
                logger.error("The engine hangs: %s. It may go on by itself; a restart kills it.", found)
            if found is None and self._hang is not None:
                logger.warning("The engine goes on.")
            self._hang = found
            await asyncio.sleep(LOOK_S)
        self._hang = None

    async def _watch(self, process: EngineProcess) -> None:
        try:
            await _announcement(process)
        except OSError as error:
            self._ended.set()
            self._tell_death(f"could not be started: {error}.")
            return
        loop = asyncio.get_running_loop()
        loop.add_reader(process.ended_fd, self._ended.set)
        await self._ended.wait()
        loop.remove_reader(process.ended_fd)  # it would be found ready for ever
        await asyncio.sleep(LAST_WORDS_S)
        self._tell_death(f"{await _how(process)}; its requests are lost. It must be restarted.")

    def _tell_death(self, how: str) -> None:
        if not self._closing:
            self._on_death(EngineDead(f"The engine process {how}"))


async def _announcement(process: EngineProcess) -> None:
    """Return once the process is there.

    Raises:
        OSError: it never will be, and why.
    """
    loop, readable = asyncio.get_running_loop(), asyncio.Event()
    fd = process.channel_fd
    loop.add_reader(fd, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(fd)
    process.take_announcement()


async def _how(process: EngineProcess) -> str:
    """How a process ended; its zygote, which tells, may have ended, too."""
    for _ in range(NUM_LOOKS):
        if process.exit_code is not None:
            break
        await asyncio.sleep(LAST_WORDS_S)
    code = process.exit_code
    if code is None:
        return "ended"
    return f"ended by signal {signal.Signals(-code).name}" if code < 0 else f"ended by exit status {code}"


def _not_started(error: Exception | None) -> EngineDead:
    """Why there is no engine process; libraries do not always say that descriptors were what they lacked."""
    if error is None or not descriptors.are_left(NUM_DESCRIPTORS):
        return DescriptorsExhausted(f"The engine process could not be started: {descriptors.shortage()}.")
    return EngineDead(f"The engine process could not be started: {error}.")
