"""Measures groups of ranks: µs of a sum over shared memory, ranks pinned to cores or not, and over gloo on loopback.

Knows nothing of engines or models. Ranks take turns being timed by rank 0; minima, medians and 90th percentiles.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection

import torch

from shuteye.parallel.gloo import GlooGroup, GlooRendezvous
from shuteye.parallel.group import Group, ShmGroup, ShmRegion

SHAPES = ((1, 576), (64, 576), (64, 2048), (512, 2048))
LAYERS = 30
ROUNDS = {"shm": 2000, "shm pinned": 2000, "gloo": 200}
"""At most; large messages get fewer."""


@dataclass(frozen=True)
class Rank:
    """How a process finds its group."""

    kind: str
    source: str
    rank: int
    size: int

    def open(self) -> Group:
        if self.kind.startswith("shm"):
            return ShmGroup(self.source, self.rank, self.size, epoch=1)
        return GlooGroup(self.source, self.rank, self.size, epoch=1)


def measure(rank: Rank, pipe: Connection) -> None:
    """Be one rank: every measurement in order; rank 0 sends the figures."""
    torch.set_num_threads(1)
    if rank.kind == "shm pinned":
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank.rank % len(cores)]})
    group = rank.open()
    for dtype in (torch.bfloat16, torch.float32):
        for rows, width in SHAPES:
            x = torch.zeros(rows, width, dtype=dtype)
            rounds = max(30, ROUNDS[rank.kind] // (1 + x.nbytes // 65536))
            pipe.send((f"all_reduce [{rows}, {width}] {dtype}".replace("torch.", ""), timed(group, x, rounds)))
    x = torch.zeros(1, 576)
    pipe.send((f"{2 * LAYERS} all_reduces [1, 576] float32", times(group, 30, lambda: step(group, x))))
    pipe.send(("barrier", times(group, 300, group.barrier)))
    group.barrier()
    group.close()
    pipe.send(None)


def timed(group: Group, x: torch.Tensor, rounds: int) -> list[float]:
    return times(group, rounds, lambda: group.all_reduce(x))


def step(group: Group, x: torch.Tensor) -> None:
    for _ in range(2 * LAYERS):
        group.all_reduce(x)


def times(group: Group, rounds: int, call: Callable[[], object]) -> list[float]:
    """µs of each call, after a few that are not counted."""
    found = []
    for _ in range(10):
        call()
    group.barrier()
    for _ in range(rounds):
        begun = time.perf_counter()
        call()
        found.append((time.perf_counter() - begun) * 1e6)
    return found


def run(kind: str, size: int) -> None:
    """Start `size` ranks, and print rank 0's figures."""
    context = get_context("spawn")
    region = GlooRendezvous(epoch=1) if kind == "gloo" else ShmRegion(size, epoch=1)
    source = region.address if isinstance(region, GlooRendezvous) else region.path
    pipes, processes = [], []
    for rank in range(size):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=measure, args=(Rank(kind, source, rank, size), theirs), daemon=True))
        processes[-1].start()
        pipes.append(ours)
    while (line := pipes[0].recv()) is not None:
        name, found = line
        deciles = statistics.quantiles(found, n=10)
        print(f"| {kind} | {name} | {min(found):,.1f} | {deciles[4]:,.1f} | {deciles[8]:,.1f} |", flush=True)
    for process in processes:
        process.join()
    if isinstance(region, ShmRegion):
        print(f"| {kind} | memory of the group, KiB | {region.resident_bytes() // 1024:,} | | |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=2, help="ranks")
    parser.add_argument("--kinds", nargs="+", choices=list(ROUNDS), default=list(ROUNDS))
    options = parser.parse_args()
    print(f"{options.size} ranks, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print("| group | call | min | median | 90th, µs |\n|---|---|---|---|---|")
    for kind in options.kinds:
        run(kind, options.size)


if __name__ == "__main__":
    main()
