"""A rank process: one worker of several, told by the engine process what to do.

`python -m shuteye.executors.rank ENDPOINT PARENT LOG_FORMAT LOG_LEVEL` reads its `Start`, one frame, from stdin.
It does one thing after the other, and ends with its parent.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from dataclasses import replace
from typing import Any, cast

import msgspec
import zmq

from shuteye import logs
from shuteye.config import EngineConfig
from shuteye.errors import ErrorInfo, InternalError, MemoryExhausted, ShuteyeError, info_of
from shuteye.executors import tcp_pairs
from shuteye.executors.frames import ARGUMENTS, MEETING_VERBS, Abort, Ask, EngineAddress, Reply, Start
from shuteye.executors.membership import Membership
from shuteye.executors.wire import connect_pair
from shuteye.handover import NamelessFile
from shuteye.processes import die_with_parent
from shuteye.typed_frames import Decoder, encode
from shuteye.worker import Worker

logger = logging.getLogger(__name__)

FIRST_EPOCH_BITS = 32
"""A rank's memory counts its epochs from that of the groups it joins first, shifted by this: what a rank in its place
had before it is never taken for what it has now."""


class _Rank:
    def __init__(self, start: Start, membership: Membership) -> None:
        self._place = start.place
        self._membership = membership
        self._received: dict[int, NamelessFile] = {}
        membership.join(start.meeting)
        self._worker = Worker(
            _settle_on_cores(start),
            place=start.place,
            groups=membership.groups if start.place.num_ranks > 1 else None,
            first_epoch=membership.epoch << FIRST_EPOCH_BITS,
            image_key=start.image_key,
        )

    def answer(self, frame: bytes) -> Reply:
        ask: Ask = _ASKS.decode(frame)
        try:
            result = self._do(ask.verb, ARGUMENTS[ask.verb].decode(ask.arguments))
            return Reply(self._membership.epoch, ask.call_id, msgspec.Raw(encode(result)))
        except BaseException as error:
            if ask.verb in MEETING_VERBS:  # all of ours: whoever fails with one group is waited for in the other
                self._membership.groups.abort(f"{ask.verb} failed: {error}")
            if not isinstance(error, Exception):
                raise
            return Reply(self._membership.epoch, ask.call_id, error=_info(error, ask.verb))

    def _do(self, verb: str, arguments: tuple[Any, ...]) -> Any:
        match verb:
            case "execute":
                return self._worker.execute(*arguments)
            case "join":
                (meeting,) = arguments
                self._membership.join(meeting)
                return None
            case "receive":
                return self._receive(*arguments)
            case "forget_received":
                while self._received:
                    self._received.popitem()[1].close()
                return None
        return self._worker.call(verb, *arguments)

    def _receive(self, number: int, content: bytes) -> str:
        """Append to a file of the engine's that this rank holds for all of its machine; where they find it."""
        try:
            if number not in self._received:
                self._received[number] = NamelessFile()
            self._received[number].write(content)
        except OSError as error:
            raise MemoryExhausted(f"New weights do not fit in shared memory ({error.strerror}).") from error
        return self._received[number].path


def _settle_on_cores(start: Start) -> EngineConfig:
    """Run on the rank's cores alone, with a thread on each; the config that says so."""
    if not start.cores:
        return start.config
    os.sched_setaffinity(0, start.cores)
    return replace(start.config, num_threads=start.config.num_threads or len(start.cores))


def _info(error: Exception, verb: str) -> ErrorInfo:
    if isinstance(error, ShuteyeError):
        return info_of(error)
    if isinstance(error, MemoryError):
        return info_of(MemoryExhausted(f"{verb} needs more memory than this rank can have."))
    logger.error("%s failed on a rank because of a bug of ours.", verb, exc_info=error)
    return info_of(InternalError(f"{verb} failed: {type(error).__name__}: {error}"))


_ASKS: Decoder[Ask] = Decoder(Ask)
_ABORTS: Decoder[Abort] = Decoder(Abort)


def _heed(engine: EngineAddress, membership: Membership) -> None:
    """On a thread: end waits when the engine says so, and this process when the engine is lost."""
    context: zmq.Context[Any] = zmq.Context()
    aborts, connection = tcp_pairs.connect(context, engine.aborts, engine)
    poller = zmq.Poller()
    poller.register(aborts, zmq.POLLIN)
    poller.register(connection.socket, zmq.POLLIN)
    while True:
        ready = dict(poller.poll())
        connection.look()
        if connection.has_gone:
            logger.error("This rank has lost its engine, and ends.")
            os._exit(1)
        if aborts in ready:
            told = _ABORTS.decode(aborts.recv())
            membership.abort(told.epoch, told.reason)


def main() -> None:
    """Serve as one rank until killed, which is how the engine process ends it."""
    die_with_parent(int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the engine decides when we end, whoever else gets the signal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that an image that is being made is swept away
    logs.configure(logs.LogSettings(cast(logs.LogFormat, sys.argv[3]), cast(logs.LogLevel, sys.argv[4])))
    start = Decoder[Start](Start).decode(sys.stdin.buffer.read())
    context: zmq.Context[Any] = zmq.Context()
    membership = Membership(start.place)
    if start.engine is None:
        socket = connect_pair(context, sys.argv[1])
    else:
        socket, connection = tcp_pairs.connect(context, start.engine.asks, start.engine)
        connection.close()  # one of the two is enough to watch
        threading.Thread(target=_heed, args=(start.engine, membership), name="shuteye-aborts", daemon=True).start()
    socket.linger = 5_000  # milliseconds: the last words, such as a refusal, must get through
    try:
        rank = _Rank(start, membership)
    except Exception as error:
        socket.send(encode(Reply(start.meeting.epoch, 0, error=_info(error, "loading"))))
        socket.close()
        context.term()
        if isinstance(error, ShuteyeError):
            sys.exit(1)
        raise
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    socket.send(encode(Reply(membership.epoch, 0)))
    while True:
        socket.send(encode(rank.answer(socket.recv())))


if __name__ == "__main__":
    main()
