"""A rank process: one worker of several, told by the engine process what to do.

`python -m shuteye.executors.rank ENDPOINT PARENT LOG_FORMAT LOG_LEVEL` reads its `Start`, one frame, from stdin.
It does one thing after the other, and ends with its parent.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from dataclasses import replace
from typing import Any, cast

import msgspec
import zmq

from shuteye import logs
from shuteye.config import EngineConfig
from shuteye.errors import ErrorInfo, GroupAborted, InternalError, ShuteyeError, info_of
from shuteye.executors.frames import ARGUMENTS, MEETING_VERBS, Ask, Meeting, Reply, Start
from shuteye.executors.wire import Decoder, connect_pair, encode
from shuteye.models.rank_decoder import RankGroups
from shuteye.parallel.group import Group, ShmGroup
from shuteye.parallel.shards import RankPlace
from shuteye.processes import die_with_parent
from shuteye.worker import Worker

logger = logging.getLogger(__name__)

FIRST_EPOCH_BITS = 32
"""A rank's memory counts its epochs from that of the groups it joins first, shifted by this: what a rank in its place
had before it is never taken for what it has now."""


def _join(place: RankPlace, meeting: Meeting) -> RankGroups:
    def group(path: str | None, rank: int, size: int) -> Group | None:
        if path is None:
            return None
        return ShmGroup(path, rank, size, epoch=meeting.epoch, timeout_s=meeting.timeout_s)

    return RankGroups(
        tensor=group(meeting.tensor, place.tp_rank, place.tp_size),
        pipeline=group(meeting.pipeline, place.pp_rank, place.pp_size),
    )


class _Rank:
    def __init__(self, start: Start) -> None:
        self._place = start.place
        self.epoch = start.meeting.epoch
        self._groups = _join(start.place, start.meeting)
        self._worker = Worker(
            _settle_on_cores(start),
            place=start.place,
            groups=self._groups if start.place.num_ranks > 1 else None,
            first_epoch=self.epoch << FIRST_EPOCH_BITS,
        )

    def answer(self, frame: bytes) -> Reply:
        ask: Ask = _ASKS.decode(frame)
        try:
            result = self._do(ask.verb, ARGUMENTS[ask.verb].decode(ask.arguments))
            return Reply(self.epoch, ask.call_id, msgspec.Raw(encode(result)))
        except BaseException as error:
            if ask.verb in MEETING_VERBS and not isinstance(error, GroupAborted):
                self._groups.abort(f"{ask.verb} failed: {error}")
            if not isinstance(error, Exception):
                raise
            return Reply(self.epoch, ask.call_id, error=_info(error, ask.verb))

    def _do(self, verb: str, arguments: tuple[Any, ...]) -> Any:
        match verb:
            case "execute":
                return self._worker.execute(*arguments)
            case "join":
                (meeting,) = arguments
                self._groups.replace(_join(self._place, meeting))
                self.epoch = meeting.epoch
                return None
        return self._worker.call(verb, *arguments)


def _settle_on_cores(start: Start) -> EngineConfig:
    """Run on the rank's cores alone, with a thread on each; the config that says so."""
    if not start.cores:
        return start.config
    os.sched_setaffinity(0, start.cores)
    return replace(start.config, num_threads=start.config.num_threads or len(start.cores))


def _info(error: Exception, verb: str) -> ErrorInfo:
    if isinstance(error, ShuteyeError):
        return info_of(error)
    logger.error("%s failed on a rank because of a bug of ours.", verb, exc_info=error)
    return info_of(InternalError(f"{verb} failed: {type(error).__name__}: {error}"))


_ASKS: Decoder[Ask] = Decoder(Ask)


def main() -> None:
    """Serve as one rank until killed, which is how the engine process ends it."""
    die_with_parent(int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the engine decides when we end, whoever else gets the signal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that an image that is being made is swept away
    logs.configure(logs.LogSettings(cast(logs.LogFormat, sys.argv[3]), cast(logs.LogLevel, sys.argv[4])))
    start = Decoder[Start](Start).decode(sys.stdin.buffer.read())
    context: zmq.Context[Any] = zmq.Context()
    socket = connect_pair(context, sys.argv[1])
    socket.linger = 5_000  # milliseconds: the last words, such as a refusal, must get through
    try:
        rank = _Rank(start)
    except Exception as error:
        socket.send(encode(Reply(start.meeting.epoch, 0, error=_info(error, "loading"))))
        socket.close()
        context.term()
        if isinstance(error, ShuteyeError):
            sys.exit(1)
        raise
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    socket.send(encode(Reply(rank.epoch, 0)))
    while True:
        socket.send(encode(rank.answer(socket.recv())))


if __name__ == "__main__":
    main()
