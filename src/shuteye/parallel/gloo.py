"""Communication groups between machines, and the oracle of `ShmGroup`: torch's gloo over TCP.

Knows nothing of who starts ranks. Only to be imported where gloo is used: torch.distributed takes long to import.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import accumulate
from queue import Empty, SimpleQueue
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, distributed

from shuteye.parallel.group import TIMEOUT_S, Array, ArrayT, Group, aborted, refused

_LOOK_S = 0.1
_gloo: Any = distributed  # exports them, but not by name


class GlooRendezvous:
    """Where the ranks of a `GlooGroup` find each other and hear of aborts; held by whoever starts them.

    Args:
        host: an address of this machine that all ranks reach.
    """

    def __init__(self, *, epoch: int, host: str = "127.0.0.1") -> None:
        self.epoch = epoch
        self._store = _gloo.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        self._store.set("epoch", str(epoch))
        self.address = f"{host}:{self._store.port}"

    def abort(self, reason: str) -> None:
        """End every wait of every rank, now and later. The first reason counts."""
        _tell_abort(self._store, by=None, reason=reason)

    def close(self) -> None:
        """End the rendezvous: ranks that have each other go on until they wait for long. Idempotent."""
        self._store = None


def _tell_abort(store: Any, *, by: int | None, reason: str, missing: Sequence[int] = ()) -> None:
    store.compare_set("aborted", "", json.dumps({"by": by, "reason": reason, "missing": list(missing)}))


class GlooGroup(Group):
    """Ranks of several machines over TCP, and the oracle of `ShmGroup`: torch's gloo, gathered, then added in order.

    An abort is noticed after a tenth of a second of waiting.

    Args:
        address: a `GlooRendezvous`' address.
        host: an address of this machine that the other ranks reach.

    Raises:
        GroupAborted: the rendezvous is of another epoch, or cannot be reached, or not all ranks came in time.
    """

    def __init__(
        self, address: str, rank: int, size: int, *, epoch: int, timeout_s: float = TIMEOUT_S, host: str = "127.0.0.1"
    ) -> None:
        self.rank, self.size, self.epoch, self.timeout_s = rank, size, epoch, timeout_s
        self._rounds = 0  # calls in which all take part
        name, _, port = address.rpartition(":")
        limit = timedelta(seconds=timeout_s)
        try:
            self._store = _gloo.TCPStore(name, int(port), is_master=False, wait_for_workers=False, timeout=limit)
            current = int(self._store.get("epoch"))
        except RuntimeError as error:
            raise refused(f"no rendezvous at {address}: {error}") from error
        if current != epoch:
            raise refused(f"this rank is of epoch {epoch}, the group of epoch {current}")
        self._jobs: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._done: SimpleQueue[RuntimeError | None] = SimpleQueue()
        self._busy = False
        self._ended: dict[str, Any] | None = None  # how, as the rendezvous has told
        self._thread = threading.Thread(
            target=_wait_for_gloo, args=(self._jobs, self._done), name="shuteye-gloo", daemon=True
        )
        self._thread.start()
        self._call("connecting", lambda: self._connect(host))

    def _connect(self, host: str) -> None:
        options = _gloo.ProcessGroupGloo._Options()
        options._devices = [_gloo.ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = timedelta(days=1)  # the deadlines are ours: gloo does not say who is missing
        # by a connection of its own: gloo waits in it for the others, and who looks for aborts would wait behind it
        store = _gloo.TCPStore(
            self._store.host,
            self._store.port,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=self.timeout_s),
        )
        self._group = _gloo.ProcessGroupGloo(_gloo.PrefixStore("gloo", store), self.rank, self.size, options)

    def all_reduce(self, x: Array) -> None:
        """Fetch the parts of all ranks and add them here; see `Group.all_reduce`."""
        mine = _tensor(x).view(-1)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        into = [[_bytes(part) for part in parts]]
        self._call("all_reduce", lambda: self._group.allgather(into, [_bytes(mine)]).wait())
        mine.copy_(list(accumulate((part.float() for part in parts), Tensor.add))[-1])

    def gather(self, x: ArrayT, widths: Sequence[int], to: int = 0) -> ArrayT | None:
        """Send columns to rank `to`, which puts them side by side; see `Group.gather`."""
        self._check_columns(x, widths)
        if self.rank != to:
            self.send(x, to)
            return None
        mine = _tensor(x)
        parts = [mine if rank == to else mine.new_empty(len(mine), width) for rank, width in enumerate(widths)]
        for rank, part in enumerate(parts):
            if rank != to:
                self.recv(part, rank)
        return _like(x, torch.cat(parts, dim=1))

    def send(self, x: Array, to: int) -> None:
        """Hand `x` to another rank's socket."""
        self._check_other(to)
        self._call("send", lambda: self._group.send([_bytes(x)], to, 0).wait(), waits_for=[to])

    def recv(self, out: Array, source: int) -> None:
        """Fill `out` with what `source` sends next."""
        self._check_other(source)
        self._call("recv", lambda: self._group.recv([_bytes(out)], source, 0).wait(), waits_for=[source])

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        self._call("barrier", lambda: self._group.barrier().wait())

    def abort(self, reason: str) -> None:
        """Write the reason where every long wait looks."""
        with contextlib.suppress(RuntimeError):  # the rendezvous is gone, which ends every wait
            _tell_abort(self._store, by=self.rank, reason=reason)

    def close(self) -> None:
        """Close the connections; of an aborted group they stay until the peers are gone."""
        self._jobs.put(None)
        if not self._busy:
            self._thread.join()  # a thread that meets the interpreter's end aborts the process

    def _call(self, what: str, job: Callable[[], object], waits_for: Sequence[int] | None = None) -> None:
        """Have gloo do `job` on its thread, and meanwhile look whether the group is aborted, or too late."""
        if self._ended is not None:
            raise aborted(self.epoch, **self._ended)
        self._rounds += waits_for is None
        deadline = time.monotonic() + self.timeout_s
        assert not self._busy, f"two threads of rank {self.rank} are in its group at once, or it was aborted"
        self._busy = True
        self._jobs.put(job)
        try:
            self._wait(what, waits_for, deadline)
        except RuntimeError as error:  # of the store
            self._ended = {"by": None, "reason": f"its rendezvous is gone: {error}"}
            raise aborted(self.epoch, **self._ended) from error

    def _wait(self, what: str, waits_for: Sequence[int] | None, deadline: float) -> None:
        while True:
            try:
                error = self._done.get(timeout=min(_LOOK_S, max(0.0, deadline - time.monotonic())))
                break
            except Empty:
                self._look(what, waits_for, is_late=time.monotonic() >= deadline)
        self._busy = False
        if error is not None:
            self.abort(f"gloo says in {what}: {error}")
            self._raise_if_aborted()

    def _look(self, what: str, waits_for: Sequence[int] | None, *, is_late: bool) -> None:
        self._store.set(f"waits/{self.rank}", str(self._rounds))
        if is_late:
            missing = self._missing() if waits_for is None else list(waits_for)
            ranks = ", ".join(map(str, missing))
            reason = f"it waited {self.timeout_s:.3g} s in {what} for rank {ranks or 'unknown'}"
            _tell_abort(self._store, by=self.rank, reason=reason, missing=missing)
        self._raise_if_aborted()

    def _missing(self) -> list[int]:
        keys = {rank: f"waits/{rank}" for rank in range(self.size) if rank != self.rank}
        told = {rank: int(self._store.get(key)) for rank, key in keys.items() if self._store.check([key])}
        return [rank for rank in keys if told.get(rank, 0) < self._rounds]

    def _raise_if_aborted(self) -> None:
        if self._store.check(["aborted"]):
            self._ended = json.loads(self._store.get("aborted"))
            raise aborted(self.epoch, **self._ended)


def _tensor(x: Array) -> Tensor:
    """The same memory as torch's; uint16 of numpy is bfloat16."""
    if not isinstance(x, np.ndarray):
        return x
    assert x.flags.c_contiguous
    tensor = torch.from_numpy(x)
    return tensor.view(torch.bfloat16) if x.dtype == np.uint16 else tensor


def _like(x: ArrayT, tensor: Tensor) -> ArrayT:
    """The tensor, in the library of `x`."""
    if not isinstance(x, np.ndarray):
        return cast("ArrayT", tensor)
    return cast("ArrayT", (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy())


def _bytes(array: Array) -> Tensor:
    x = _tensor(array)
    assert x.is_contiguous()
    return x.view(-1).view(torch.uint8) if x.numel() else x.new_empty(0, dtype=torch.uint8)


@torch.inference_mode()  # as of whoever waits: gloo fills tensors that may have been made in it
def _wait_for_gloo(jobs: SimpleQueue[Callable[[], object] | None], done: SimpleQueue[RuntimeError | None]) -> None:
    while (job := jobs.get()) is not None:
        try:
            job()
        except RuntimeError as error:
            done.put(error)
        else:
            done.put(None)
