"""Ranks as threads of one process, with a group that adds up in rank order; deterministic, and never waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Queue
from typing import Any

import numpy as np

from shuteye.matrices.bfloat16 import Numbers, bfloat16_bits, float32_of
from shuteye.models.rank_groups import RankGroups
from shuteye.parallel.shards import RankPlace

TIMEOUT_S = 20.0


@dataclass
class Meeting:
    """Where the ranks of one group leave their tensors."""

    size: int
    barrier: threading.Barrier = field(init=False)
    left: list[Any] = field(init=False)
    mail: dict[tuple[int, int], Queue[Numbers]] = field(init=False)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=TIMEOUT_S)
        self.left = [None] * self.size
        self.mail = {(source, to): Queue() for source in range(self.size) for to in range(self.size)}


@dataclass
class ThreadGroup:
    """One rank of a meeting. `sums` keeps what every `all_reduce` gave."""

    meeting: Meeting
    rank: int
    sums: list[Numbers] = field(default_factory=list)

    def _exchange(self, x: Numbers) -> list[Numbers]:
        self.meeting.left[self.rank] = x.copy()
        self.meeting.barrier.wait()
        seen = list(self.meeting.left)
        self.meeting.barrier.wait()
        return seen

    def all_reduce(self, x: Numbers) -> None:
        assert x.flags.c_contiguous
        parts = self._exchange(x)
        assert {part.shape for part in parts} == {x.shape}
        total = float32_of(parts[0])
        for part in parts[1:]:
            total = total + float32_of(part)
        x[...] = bfloat16_bits(total) if x.dtype == np.uint16 else total
        self.sums.append(x.copy())

    def gather(self, x: Numbers, widths: Sequence[int], to: int = 0) -> Numbers | None:
        assert x.flags.c_contiguous
        parts = self._exchange(x)
        assert [part.shape for part in parts] == [(len(x), width) for width in widths]
        return np.concatenate(parts, axis=-1) if self.rank == to else None

    def send(self, x: Numbers, to: int) -> None:
        assert x.flags.c_contiguous
        self.meeting.mail[self.rank, to].put(x.copy())

    def recv(self, out: Numbers, source: int) -> None:
        sent = self.meeting.mail[source, self.rank].get(timeout=TIMEOUT_S)
        assert (sent.shape, sent.dtype) == (out.shape, out.dtype)
        out[...] = sent


def thread_groups(place: RankPlace) -> list[RankGroups]:
    """The groups of every rank, by rank."""
    stages = [Meeting(place.tp_size) for _ in range(place.pp_size)]
    lines = [Meeting(place.pp_size) for _ in range(place.tp_size)]
    return [
        RankGroups(
            tensor=ThreadGroup(stages[each.pp_rank], each.tp_rank) if place.tp_size > 1 else None,
            pipeline=ThreadGroup(lines[each.tp_rank], each.pp_rank) if place.pp_size > 1 else None,
        )
        for each in place.all()
    ]


def on_all_ranks(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run one call per rank, each on a thread of its own; what each gave, or the first error."""
    with ThreadPoolExecutor(len(calls)) as threads:
        futures = [threads.submit(call) for call in calls]
        return [future.result() for future in futures]
