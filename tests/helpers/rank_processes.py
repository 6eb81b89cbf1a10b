"""Processes that are ranks of a group: each runs one function of a test, and its result or error comes back."""

from __future__ import annotations

import os
import signal
import traceback
from dataclasses import dataclass
from multiprocessing import get_context

import chosen_library  # noqa: F401
import torch

from shuteye.errors import GroupAborted
from shuteye.parallel.gloo import GlooGroup, GlooRendezvous
from shuteye.parallel.group import ShmGroup, ShmRegion

PATIENCE_S = 30
_context = get_context("forkserver")  # what takes long to import is imported once, in the server
_context.set_forkserver_preload(["shuteye.parallel.gloo", "numpy", "pytest", "hypothesis"])


@dataclass(frozen=True)
class Ended:
    """How a rank's `GroupAborted` looked from here."""

    message: str
    by: int | None
    missing: tuple[int, ...]


class Ranks:
    """`size` processes that each call body(group, *arguments) on a group of `kind`; killed at the end whatever happens.

    What is needed to abort them is `region`. A rank says "ready" once all have come.
    """

    def __init__(self, kind, size, body, *arguments, timeout_s=20.0, epoch=1, **region_options):
        self.region = ShmRegion(size, epoch=epoch, **region_options) if kind == "shm" else GlooRendezvous(epoch=epoch)
        source = self.region.path if kind == "shm" else self.region.address
        self._pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = _context.Pipe()
            options = (kind, source, rank, size, epoch, timeout_s)
            process = _context.Process(target=_be_rank, args=(theirs, options, body, arguments), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)
        for rank in range(size):
            assert self.receive(rank) == "ready"

    def receive(self, rank):
        """The next thing that a rank has sent."""
        assert self._pipes[rank].poll(PATIENCE_S), f"rank {rank} has said nothing"
        return self._pipes[rank].recv()

    def results(self, ranks=None):
        """What the bodies returned, or how they were `Ended`, by rank."""
        found = [self.receive(rank) for rank in (range(len(self.processes)) if ranks is None else ranks)]
        for one in found:
            assert not isinstance(one, str), one
        return found

    def signal(self, rank, number):
        os.kill(self.processes[rank].pid, number)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
        for process, pipe in zip(self.processes, self._pipes, strict=True):
            process.join()
            process.close()
            pipe.close()
        self.region.close()


def run(kind, size, body, *arguments, **options):
    """The results of `size` ranks."""
    with Ranks(kind, size, body, *arguments, **options) as ranks:
        return ranks.results()


def _be_rank(pipe, options, body, arguments):
    kind, source, rank, size, epoch, timeout_s = options
    torch.set_num_threads(1)
    try:
        make = ShmGroup if kind == "shm" else GlooGroup
        group = make(source, rank, size, epoch=epoch, timeout_s=PATIENCE_S)
        group.barrier()
        group.timeout_s = timeout_s  # of what is tested; a busy machine may take longer to begin
        pipe.send("ready")
        pipe.send(_outcome(group, body, arguments))
        group.close()
    except Exception:  # noqa: BLE001  (what went wrong is for the test to tell)
        pipe.send(traceback.format_exc())
    pipe.recv() if pipe.poll(PATIENCE_S) else None  # stays until the test ends: a peer that goes is another matter


def _outcome(group, body, arguments):
    try:
        return body(group, *arguments)
    except GroupAborted as error:
        return Ended(error.message, error.by, error.missing)
