"""Ranks on the machines of a Ray cluster. Ray places, starts and watches them; what they are asked goes over sockets.

Knows nothing of what that is. ADR 19 says why Ray does no more. One of two modules that import Ray.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import zmq

import shuteye
from shuteye import logs
from shuteye.config import EngineConfig
from shuteye.executors.frames import Abort, Reply, Start
from shuteye.executors.links import Groups, RankLink
from shuteye.executors.ray_cluster import RayCluster, Room
from shuteye.executors.ray_host import HostOrder, RankHost
from shuteye.executors.ray_placement import Machine
from shuteye.executors.spread_groups import SpreadGroups
from shuteye.executors.tcp_pairs import ConnectionMonitor, FrontDoor
from shuteye.parallel.shards import RankPlace
from shuteye.typed_frames import Decoder, encode

logger = logging.getLogger(__name__)

START_S = 60.0
"""How long a rank may take to be at its socket: an actor that has room starts within seconds."""
_GRACE_S = 10.0
"""How long a process that still loads may take to delete what it has begun."""
_TELL_S = 1.0
"""How long Ray may take to say what has become of a rank whose connection is lost."""
_LOOK_MS = 200


class RayLauncher:
    """Starts an actor for each rank in a placement group of their own; see `Launcher`.

    Raises:
        InvalidRequest: no Ray, no cluster, or too few CPUs in it.
    """

    def __init__(self, config: EngineConfig, places: tuple[RankPlace, ...]) -> None:
        self._places = places
        self._links: dict[int, RayRank] = {}
        self._crossing: set[tuple[int, ...]] = set()
        self._machines: dict[int, Machine] = {}
        self._told: tuple[int, str] | None = None  # of the newest groups that were aborted: their epoch, and why
        self._name = f"shuteye-{secrets.token_hex(3)}"
        with contextlib.ExitStack() as stack:
            self._cluster = RayCluster()
            stack.callback(self._cluster.close)
            placement = self._cluster.place(places, config)
            self._room = Room(placement, self._name)
            stack.callback(self._room.close)
            self._context: zmq.Context[Any] = zmq.Context()
            stack.callback(self._context.term)
            self._door = FrontDoor(self._context, self._cluster.here.address)
            stack.callback(self._door.close)
            self._num_threads = placement.cpus_per_rank
            self._opened = stack.pop_all()

    def start(self, start: Start) -> RankLink:
        """See `Launcher.start`."""
        rank, epoch = start.place.rank, start.meeting.epoch
        name = "-".join(
            filter(None, (f"{self._name}-rank{rank}", start.place.label, f"epoch{epoch}" if epoch > 1 else ""))
        )
        options = self._room.options(rank) | {"name": name}
        link = RayRank(self._door, self._findable(start), self._machines[rank], options)
        self._links[rank] = link
        if self._told is not None and self._told[0] >= epoch:  # another rank has died before this one was there to hear
            link.abort(*self._told)
        return link

    def _findable(self, start: Start) -> Start:
        """Paths as other machines may have them; what else a model may be called is left as it is."""
        config, model = start.config, start.config.model
        config = replace(
            config,
            model=str(Path(model).absolute()) if Path(model).exists() else model,
            cache_dir=config.cache_dir.absolute(),
            num_threads=self._num_threads,
        )
        return msgspec.structs.replace(start, config=config)

    def groups(self, *, epoch: int, timeout_s: float) -> Groups:
        """See `Launcher.groups`."""
        where = self._room.machine_of_bundles(self._cluster.machines())
        placement = self._room.placement
        self._machines = {place.rank: where[placement.bundle_of(place.rank)] for place in self._places}
        return SpreadGroups(
            self._places,
            {rank: machine.address for rank, machine in self._machines.items()},
            epoch=epoch,
            timeout_s=timeout_s,
            host=self._cluster.here.address,
            crossing=self._crossing,
            tell=self._tell,
        )

    def away(self) -> Mapping[int, int]:
        """See `Launcher.away`."""
        here = self._cluster.here.node_id
        first = {machine.node_id: rank for rank, machine in sorted(self._machines.items(), reverse=True)}
        return {rank: first[machine.node_id] for rank, machine in self._machines.items() if machine.node_id != here}

    def _tell(self, epoch: int, reason: str) -> None:
        self._told = (epoch, reason)
        for link in tuple(self._links.values()):
            link.abort(epoch, reason)

    def close(self) -> None:
        """See `Launcher.close`."""
        self._opened.close()


class RayRank:
    """One rank on a machine of the cluster; see `RankLink`.

    It has ended when Ray says so, when its connection is lost, and when it has not come within `START_S`.

    Args:
        options: of its actor.

    Attributes:
        module: what its process runs.
    """

    module: ClassVar[str] = "shuteye.executors.rank"

    def __init__(self, door: FrontDoor, start: Start, machine: Machine, options: Mapping[str, Any]) -> None:
        self.rank = start.place.rank
        self.epoch = start.meeting.epoch
        self.machine = machine
        self._door = door
        self._why_killed: str | None = None
        self._how: str | None = None  # it ended, as Ray says
        self._seen = "ended"  # as this side sees it
        self._ended_at: float | None = None
        self._lock = threading.Lock()
        self._ray_told = threading.Event()
        self._closing = threading.Event()
        self._has_answered = False
        self._unsent: Abort | None = None
        self._replies: Decoder[Reply] = Decoder(Reply)
        self.ended_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.socket, self._aborts, self._address = door.open()
        self._connection = ConnectionMonitor(self.socket)
        self._actor = self._make_actor(start, options)
        self._thread = threading.Thread(target=self._watch, name=f"shuteye-rank{self.rank}", daemon=True)
        self._thread.start()

    def _make_actor(self, start: Start, options: Mapping[str, Any]) -> Any:
        import ray

        logged = logs.settings()
        frame = encode(msgspec.structs.replace(start, engine=self._address))
        order = HostOrder(self.module, frame, shuteye.__version__, logged.format, logged.level)
        actor = ray.remote(RankHost).options(max_restarts=0, max_concurrency=2, **options).remote()
        actor.run.remote(order).future().add_done_callback(self._note_end)
        return actor

    # --- asking ---------------------------------------------------------------------------------

    def post(self, frame: bytes) -> None:
        """See `RankLink.post`."""
        with contextlib.suppress(zmq.Again):  # nobody is at the other end: its end is seen soon
            self.socket.send(frame, zmq.NOBLOCK)

    def received(self) -> Reply | None:
        """See `RankLink.received`; a refusal to load names the machine."""
        try:
            reply = self._replies.decode(self.socket.recv(zmq.NOBLOCK))
        except zmq.Again:
            return None
        self._has_answered = True
        if reply.call_id == 0 and reply.error is not None:
            error = replace(reply.error, message=f"on {self.machine.address}: {reply.error.message}")
            return msgspec.structs.replace(reply, error=error)
        return reply

    def abort(self, epoch: int, reason: str) -> None:
        """Have it end every wait in the groups of `epoch`; from any thread. One that has not come yet is told later."""
        with self._lock:
            self._unsent = Abort(epoch, reason)
        self._send_abort()

    def _send_abort(self) -> None:
        with self._lock, contextlib.suppress(zmq.Again):
            if self._unsent is not None and not self._closing.is_set():
                self._aborts.send(encode(self._unsent), zmq.NOBLOCK)
                self._unsent = None

    # --- its end --------------------------------------------------------------------------------

    def check(self) -> None:
        """Nothing is left to look at: heartbeats notice whatever stops it; see `RankLink.check`."""

    def kill(self, why: str) -> None:
        """See `RankLink.kill`. If it is out of reach, it ends by itself once its socket here is closed."""
        self._why_killed = self._why_killed or why
        self._kill_actor()
        self._end("was killed")

    def reap(self) -> str:
        """See `RankLink.reap`."""
        assert self._ended_at is not None
        if self._why_killed is None:
            self._ray_told.wait(max(0.0, self._ended_at + _TELL_S - time.monotonic()))
        how = f"was killed, as it {self._why_killed}" if self._why_killed else self._how or self._seen
        return f"{how}, on {self.machine.address}"

    def stop_loading(self) -> None:
        """See `RankLink.stop_loading`."""
        if not self._has_answered and not self._ray_told.is_set():
            self._actor.stop_loading.remote()

    def close(self) -> None:
        """See `RankLink.close`."""
        if self._closing.is_set():
            return
        self.stop_loading()
        if not self._has_answered and self._connection.has_come:
            self._ray_told.wait(_GRACE_S)
        self._kill_actor()
        self._closing.set()
        self._thread.join()
        self._door.forget(self._address)
        with self._lock:
            self._connection.close()
            self.socket.close()
            self._aborts.close()
            os.close(self.ended_fd)

    def _kill_actor(self) -> None:
        import ray

        with contextlib.suppress(Exception):  # the cluster is gone, and with it all actors
            ray.kill(self._actor)

    def _note_end(self, future: Future[str]) -> None:
        """On a thread of Ray's."""
        try:
            self._how = future.result()
        except BaseException as error:  # noqa: BLE001 (it is told as the reason)
            self._how = _of_actor(error)
        self._ray_told.set()
        self._end(self._how)

    def _end(self, seen: str) -> None:
        with self._lock:
            if self._ended_at is None and not self._closing.is_set():
                self._seen, self._ended_at = seen, time.monotonic()
                os.eventfd_write(self.ended_fd, 1)

    def _watch(self) -> None:
        """On a thread of its own: whether it comes, and whether it goes."""
        deadline = time.monotonic() + START_S
        while not self._closing.is_set():
            self._connection.socket.poll(_LOOK_MS)
            self._connection.look()
            self._send_abort()
            if self._connection.has_gone:
                self._end(
                    "has lost its connection to the engine: its process or machine stopped, or the network failed"
                )
                return
            if not self._connection.has_come and time.monotonic() > deadline:
                self._end(f"could not be started within {START_S:g} s: its machine is out of reach, or has no room")
                return


def _of_actor(error: BaseException) -> str:
    """What Ray says of an actor that is no more, without its advice."""
    text = str(error)
    if "ray.kill" in text:
        return "was ended through Ray"
    if (begin := text.find("The actor is dead because")) >= 0:
        return (
            f"was ended with its actor, as Ray says: {text[begin:].split('Some common causes', maxsplit=1)[0].strip()}"
        )
    return f"could not be started: {text.strip().splitlines()[-1] if text.strip() else type(error).__name__}"
