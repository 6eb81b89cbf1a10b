"""The communication group of a model's ranks, and its form within a machine: shared memory. No rank waits for ever.

Knows nothing of models or of who starts ranks. ADR 17 has the protocol; `csrc/group.h` says what threads may do.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import numpy as np

from shuteye.errors import GroupAborted
from shuteye.file_locks import closing_on_error
from shuteye.matrices.bfloat16 import Numbers
from shuteye.memory.backends import failure_of
from shuteye.native import library as structs
from shuteye.native.library import load

if TYPE_CHECKING:
    from torch import Tensor

TIMEOUT_S = 60.0
SLOT_BYTES = 512 << 10
"""What a rank can add up in one round; two slots a rank. [64, 2048] of float32 fits, as does [227, 576]."""

MESSAGE_BYTES = 256 << 10
"""The largest piece of a message; two under way, from each rank to each other one."""

Array: TypeAlias = "Numbers | Tensor"
"""What ranks exchange: of numpy, where bfloat16 is its bits as uint16, or of torch, which is not imported for it."""

ArrayT = TypeVar("ArrayT", bound=Array)


class Group(ABC):
    """The ranks that compute one model together, as one of them sees them.

    All ranks make the same calls in the same order, with arrays of the same shapes and dtypes: contiguous, on the
    CPU. One thread of a rank at a time; `abort` from any. Every call but `abort` and `close` raises `GroupAborted` if
    the group is aborted, by whomever, and aborts it if a wait outlasts `timeout_s`. What it was to fill is undefined
    then, and other ranks may have come through: only what all ranks report as done is done. There is no way back: ranks
    go on in a new group, of the next epoch.

    Attributes:
        rank: of 0 … size - 1.
        epoch: which group this is, of those that the same ranks have had. Not that of memory (ADR 13).
        timeout_s: the longest wait; may be set.
    """

    rank: int
    size: int
    epoch: int
    timeout_s: float

    @abstractmethod
    def all_reduce(self, x: Array) -> None:
        """Add the ranks' `x`, float32 or bfloat16, in place.

        Summed in rank order as float32 and rounded once, by every rank alike: the bits are the same on all.
        """

    @abstractmethod
    def gather(self, x: ArrayT, widths: Sequence[int], to: int = 0) -> ArrayT | None:
        """Put the ranks' columns side by side: `x` [rows, widths[rank]] → [rows, sum(widths)] on rank `to`, else None.

        Args:
            widths: columns of each rank, the same on all ranks; they may differ, and be 0.
        """

    @abstractmethod
    def send(self, x: Array, to: int) -> None:
        """Hand `x` to another rank; returns once it has been taken, or is under way."""

    @abstractmethod
    def recv(self, out: Array, source: int) -> None:
        """Fill `out` with what `source` sends next, of the same size."""

    @abstractmethod
    def barrier(self) -> None:
        """Wait until every rank has come here."""

    @abstractmethod
    def abort(self, reason: str) -> None:
        """End every wait of every rank, now and later. The first reason counts."""

    @abstractmethod
    def close(self) -> None:
        """Give back memory and connections; no call may be running. Idempotent."""

    def _check_columns(self, x: Array, widths: Sequence[int]) -> None:
        assert len(widths) == self.size, f"{len(widths)} widths for {self.size} ranks"
        assert x.shape[1:] == (widths[self.rank],), f"{tuple(x.shape)} has not {widths[self.rank]} columns"

    def _check_other(self, rank: int) -> None:
        assert 0 <= rank < self.size, f"there is no rank {rank} of {self.size}"
        assert rank != self.rank, "a rank sends nothing to itself"


def aborted(epoch: int, by: int | None, reason: str, missing: Sequence[int] = ()) -> GroupAborted:
    """The error of a group that rank `by`, or the engine, has ended."""
    who = "the engine" if by is None else f"rank {by}"
    return GroupAborted(f"The ranks' group of epoch {epoch} was aborted by {who}: {reason}.", by=by, missing=missing)


def refused(why: str) -> GroupAborted:
    """The error of a rank that a group does not take."""
    return GroupAborted(f"The group does not take this rank: {why}.")


def _address(x: Array) -> int:
    if isinstance(x, np.ndarray):
        assert x.flags.c_contiguous, f"needs contiguous memory, got strides {x.strides}"
        return x.ctypes.data
    assert x.is_contiguous(), f"needs contiguous memory, got strides {x.stride()}"
    return x.data_ptr()


def _dtype_number(x: Array) -> int:
    """What csrc/types.h calls the dtype of numbers that are added up."""
    return {4: 0, 2: 1}[x.itemsize]


def _empty(like: ArrayT, shape: tuple[int, int]) -> ArrayT:
    made = np.empty(shape, like.dtype) if isinstance(like, np.ndarray) else like.new_empty(shape)
    return cast("ArrayT", made)


class _Mapping:
    """A group's memory in this process, and the native library's handle on it; both go when nobody holds this."""

    def __init__(self, fd: int) -> None:
        self.nbytes = os.fstat(fd).st_size
        if self.nbytes < ctypes.sizeof(structs.Region):
            raise refused("its memory is too small")
        try:
            self._memory = mmap.mmap(fd, self.nbytes)
        except OSError as error:
            raise failure_of("mapping the shared memory of a group of ranks", error.errno) from error
        self._pin = ctypes.c_char.from_buffer(self._memory)
        self.address = ctypes.addressof(self._pin)
        self.region = structs.Region.from_address(self.address)
        self.handle = 0
        self._closing = threading.Lock()

    def take_handle(self, rank: int) -> None:
        self.handle = load().shuteye_group_create(self.address, rank)

    def fault(self) -> GroupAborted | None:
        """The error that says why the group was aborted, if it was."""
        fault, region = structs.Fault(), self.region
        if not load().shuteye_group_fault(self.handle, ctypes.byref(fault)):
            return None
        missing = [rank for rank in range(region.size) if fault.missing >> rank & 1]
        by = fault.by if fault.by < region.size else None
        return aborted(region.epoch, by, fault.reason.decode(errors="replace"), missing)

    def abort(self, reason: str) -> None:
        """From any thread, also while another closes this; once that is done it tells nobody."""
        with self._closing:
            if self.handle:
                load().shuteye_group_abort(self.handle, reason.encode())

    def close(self) -> None:
        with self._closing:
            if self.handle:
                load().shuteye_group_destroy(self.handle)
            self.handle = 0
            del self.region, self._pin
            self._memory.close()


class ShmRegion:
    """The memory of one group of one epoch, held by whoever starts its ranks and sees them die.

    Ranks find it by `fd` (`pass_fds`) or by `path`. It has no name and ends with the last who has it open or mapped.
    Memory is used where it is touched: `2 * slot_bytes` a rank, `2 * message_bytes` for each pair that sends.

    Raises:
        NativeUnavailable: the native library cannot be used here.
        BackendFailure, MemoryExhausted: the system does not give the memory.
    """

    def __init__(
        self, size: int, *, epoch: int, slot_bytes: int = SLOT_BYTES, message_bytes: int = MESSAGE_BYTES
    ) -> None:
        nbytes = load().shuteye_region_bytes(size, slot_bytes, message_bytes)
        assert nbytes, f"no group has {size} ranks with slots of {slot_bytes} and messages of {message_bytes} bytes"
        self.fd = _make_file(nbytes)
        with closing_on_error(self.fd):
            self._mapping = _Mapping(self.fd)
        self.epoch = epoch
        load().shuteye_region_format(self._mapping.address, size, epoch, slot_bytes, message_bytes)
        self._mapping.take_handle(size)
        self._finalizer = weakref.finalize(self, _close_region, self._mapping, self.fd)

    @property
    def path(self) -> str:
        """Where ranks that run already find it, while this process has it."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    def abort(self, reason: str) -> None:
        """End every wait of every rank, now and later; from any thread. The first reason counts."""
        self._mapping.abort(reason)

    def fault(self) -> GroupAborted | None:
        """The error that says why the group was aborted, if it was, by anyone."""
        return self._mapping.fault()

    def resident_bytes(self) -> int:
        """Physical memory that the group has taken so far."""
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        """Give up this process' part; ranks keep theirs. Idempotent."""
        self._finalizer()


def _make_file(nbytes: int) -> int:
    """A nameless file in memory that keeps its size, so that no rank can make the others crash."""
    try:
        fd = os.memfd_create("shuteye-group", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with closing_on_error(fd):
            os.ftruncate(fd, nbytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError as error:
        raise failure_of("making the shared memory of a group of ranks", error.errno) from error
    return fd


def _close_region(mapping: _Mapping, fd: int) -> None:
    mapping.close()
    os.close(fd)


class ShmGroup(Group):
    """Ranks of one machine over shared memory: about a microsecond a sum where each has a core of its own.

    Args:
        source: a `ShmRegion`'s `fd`, which the caller may close afterwards, or its `path`.

    Raises:
        NativeUnavailable: the native library cannot be used here.
        GroupAborted: the region is of another epoch, size or version, or somebody has this rank's place.
    """

    def __init__(self, source: int | str, rank: int, size: int, *, epoch: int, timeout_s: float = TIMEOUT_S) -> None:
        self.rank, self.size, self.epoch = rank, size, epoch
        self._mapping = _open(source)
        try:
            self._take_place()
        except BaseException:
            self._mapping.close()
            raise
        self._finalizer = weakref.finalize(self, self._mapping.close)
        self._in_call = threading.Lock()
        self.timeout_s = timeout_s

    def _take_place(self) -> None:
        mapping, region = self._mapping, self._mapping.region
        if wrong := load().shuteye_region_check(mapping.address, mapping.nbytes):
            raise refused(wrong.decode())
        if region.epoch != self.epoch:
            raise refused(f"this rank is of epoch {self.epoch}, the group of epoch {region.epoch}")
        if region.size != self.size or not 0 <= self.rank < self.size:
            raise refused(f"it has {region.size} ranks, this would be rank {self.rank} of {self.size}")
        if not load().shuteye_region_take_seat(mapping.address, self.rank):
            raise refused(f"another process is rank {self.rank} of epoch {self.epoch}")
        mapping.take_handle(self.rank)

    @property
    def timeout_s(self) -> float:
        """The longest wait; of native code in `call`, too."""
        return self._timeout_s

    @timeout_s.setter
    def timeout_s(self, seconds: float) -> None:
        self._timeout_s = seconds
        load().shuteye_group_set_timeout(self._mapping.handle, seconds)

    def all_reduce(self, x: Array) -> None:
        """Add the ranks' `x` in place, in pieces if it does not fit a slot; see `Group.all_reduce`."""
        dtype, address = _dtype_number(x), _address(x)
        self._reduce(structs.Reduce(dtype, dtype, 1, x.nbytes // x.itemsize, address, None, None, None, address))

    def all_reduce_into(
        self,
        out: Array,
        part: Array,
        *,
        bias: Array | None = None,
        residual: Array | None = None,
        residual_rows: Array | None = None,
    ) -> None:
        """As the native decoder ends a product: out = residual + (sum of the ranks' parts + bias).

        The sum with its bias is rounded to `out`'s dtype before the residual is added, as within one rank.

        Args:
            out: [rows, width], float32 or bfloat16; may be `part`, or `residual` without `residual_rows`.
            part: [rows, width], float32 or of `out`'s dtype.
            bias, residual: [width] and [*, width], of `out`'s dtype.
            residual_rows: int64 [rows], which rows of `residual` are meant; None: the first ones.
        """
        rows, width = out.shape
        assert part.shape == out.shape
        assert all(other is None or other.dtype == out.dtype for other in (bias, residual))
        assert residual_rows is None or residual_rows.itemsize == 8
        addresses = (None if each is None else _address(each) for each in (part, bias, residual, residual_rows, out))
        self._reduce(structs.Reduce(_dtype_number(out), _dtype_number(part), rows, width, *addresses))

    def _reduce(self, call: structs.Reduce) -> None:
        self.call(load().shuteye_group_reduce, ctypes.byref(call))

    def gather(self, x: ArrayT, widths: Sequence[int], to: int = 0) -> ArrayT | None:
        """Put columns side by side on rank `to`; all ranks wait until it has come. See `Group.gather`."""
        self._check_columns(x, widths)
        row_bytes = (ctypes.c_int64 * self.size)(*(width * x.itemsize for width in widths))
        out = _empty(x, (x.shape[0], sum(widths))) if self.rank == to else None
        into = None if out is None else _address(out)
        self.call(load().shuteye_group_gather, _address(x), x.shape[0], row_bytes, to, into)
        return out

    def send(self, x: Array, to: int) -> None:
        """Hand `x` to another rank: two pieces of `message_bytes` are taken at once, the rest as `to` receives."""
        self._check_other(to)
        self.call(load().shuteye_group_send, _address(x), x.nbytes, to)

    def recv(self, out: Array, source: int) -> None:
        """Fill `out` with what `source` sends next; another size aborts the group."""
        self._check_other(source)
        self.call(load().shuteye_group_receive, _address(out), out.nbytes, source)

    def barrier(self) -> None:
        """A round in which nothing is added up."""
        self.call(load().shuteye_group_barrier)

    def abort(self, reason: str) -> None:
        """Write the reason where every wait looks, and wake who sleeps."""
        self._mapping.abort(reason)

    def close(self) -> None:
        """Unmap the memory, once no call runs. Idempotent."""
        with self._in_call:
            self._finalizer()

    def call(self, function: Callable[..., int], *arguments: Any) -> None:
        """Let `function(handle, …)` make this rank's calls, on a `shuteye::Group*`; 0 from it is an aborted group.

        For native code that computes between its calls; nothing keeps the handle.
        """
        if not self._in_call.acquire(blocking=False):
            raise AssertionError(f"two threads of rank {self.rank} are in its group at once")
        try:
            handle = self._mapping.handle
            assert handle, "the group is closed"
            if not function(handle, *arguments):
                fault = self._mapping.fault()
                assert fault is not None
                raise fault
        finally:
            self._in_call.release()


def _open(source: int | str) -> _Mapping:
    if isinstance(source, int):
        return _Mapping(source)
    try:
        fd = os.open(source, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise refused(f"its memory is gone: {error}") from error
    try:
        return _Mapping(fd)
    finally:
        os.close(fd)
