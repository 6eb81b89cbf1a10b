"""Ranks as processes of this machine, which meet in memory that this process makes."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import zmq

from shuteye.config import EngineConfig
from shuteye.errors import MemoryExhausted
from shuteye.executors.frames import HeldRegion, Meeting, Start
from shuteye.executors.links import Groups, RankLink
from shuteye.executors.rank_process import RankProcess
from shuteye.models.converter import Order, obtain_image
from shuteye.models.progress import LoggedProgress
from shuteye.parallel.group import ShmRegion
from shuteye.parallel.shards import RankPlace, even_ranges


class LocalLauncher:
    """Starts a process for each rank; see `Launcher`."""

    def __init__(self, places: tuple[RankPlace, ...]) -> None:
        self._places = places
        self._context: zmq.Context[Any] = zmq.Context()

    def start(self, start: Start) -> RankLink:
        """See `Launcher.start`."""
        cores = divide_cores(sorted(os.sched_getaffinity(0)), len(self._places))[start.place.rank]
        try:
            return RankProcess(self._context, msgspec.structs.replace(start, cores=cores))
        except OSError as error:
            raise MemoryExhausted(f"The process of rank {start.place.rank} cannot be started: {error}.") from error

    def groups(self, *, epoch: int, timeout_s: float) -> Groups:
        """See `Launcher.groups`."""
        return Regions(self._places, epoch=epoch, timeout_s=timeout_s)

    def away(self) -> Mapping[int, int]:
        """None; see `Launcher.away`."""
        return {}

    def close(self) -> None:
        """See `Launcher.close`."""
        self._context.term()


def make_images(config: EngineConfig, place: RankPlace) -> None:
    """Where the image of `place` is not there, make those of all ranks: once, rather than by each of them.

    Raises:
        ShuteyeError: the model cannot be had, served or divided; no rank needs to be started to say so.
    """
    obtain_image(Order.of(config, place), LoggedProgress()).close()


def divide_cores(cores: Sequence[int], num_ranks: int) -> tuple[tuple[int, ...], ...]:
    """Each rank's cores: neighbours, so that ranks that wait for one another never wait for one core.

    Of fewer cores than ranks each has one, which those of another stage have, too.
    """
    if num_ranks == 1:
        return ((),)
    if len(cores) < num_ranks:
        return tuple((cores[rank % len(cores)],) for rank in range(num_ranks))
    return tuple(tuple(cores[index] for index in part) for part in even_ranges(len(cores), num_ranks))


class Regions:
    """The memory of one epoch's groups: one for the ranks of each stage, one for those of each place in a stage."""

    def __init__(self, places: tuple[RankPlace, ...], *, epoch: int, timeout_s: float) -> None:
        first = places[0]
        self._epoch, self._timeout_s = epoch, timeout_s
        self._lock = threading.Lock()
        self._tensor: list[ShmRegion] = []
        self._pipeline: list[ShmRegion] = []
        if first.tp_size > 1:
            self._tensor = [ShmRegion(first.tp_size, epoch=epoch) for _ in range(first.pp_size)]
        if first.pp_size > 1:
            self._pipeline = [ShmRegion(first.pp_size, epoch=epoch) for _ in range(first.tp_size)]

    def meeting(self, place: RankPlace) -> Meeting:
        """What a rank must know to join."""
        return Meeting(
            self._epoch,
            tensor=HeldRegion(self._tensor[place.pp_rank].path) if self._tensor else None,
            pipeline=HeldRegion(self._pipeline[place.tp_rank].path) if self._pipeline else None,
            timeout_s=self._timeout_s,
        )

    @property
    def aborted(self) -> bool:
        """Whether a group was ended, by whomever."""
        return any(region.fault() is not None for region in (*self._tensor, *self._pipeline))

    def abort(self, reason: str) -> None:
        """End every wait of every rank; from any thread."""
        with self._lock:
            for region in (*self._tensor, *self._pipeline):
                region.abort(reason)

    def close(self) -> None:
        """Give up this process' part. Idempotent."""
        with self._lock:
            for region in (*self._tensor, *self._pipeline):
                region.close()
            self._tensor, self._pipeline = [], []
