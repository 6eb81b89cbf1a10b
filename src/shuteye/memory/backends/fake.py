"""A memory backend for tests: real memory, poisoned when fresh, failing exactly where it is told to.

Shipped, so that plug-in authors can test with it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from shuteye.errors import BackendFailure, MemoryExhausted, ShuteyeError
from shuteye.memory.backends import MemoryBackend
from shuteye.memory.backends.linux import LinuxBackend

POISON = 0xA5
"""Fresh pages read as zero and hide bugs; this byte makes a small negative number of every float type."""

When = Literal["before", "after"]


@dataclass(frozen=True, slots=True)
class _Trap:
    """Springs at step number `step` (counted in `steps`), or at the next step that is `verb`."""

    step: int | None
    verb: str | None
    when: When
    error: ShuteyeError

    def springs(self, step: int, verb: str) -> bool:
        return step == self.step or verb == self.verb


class FakeBackend:
    """Wraps a real backend; every verb is a step that is recorded and can be made to fail.

    Attributes:
        steps: the verbs called, in order.
        available: what `available_bytes` answers; None asks the real backend.
    """

    name = "fake"

    def __init__(self, inner: MemoryBackend | None = None) -> None:
        self.steps: list[str] = []
        self.available: int | None = None
        self._inner = inner or LinuxBackend()
        self.page_bytes = self._inner.page_bytes
        self._traps: list[_Trap] = []

    def fail_at(self, step: int, *, when: When = "before", error: ShuteyeError | None = None) -> None:
        """Fail the `step`-th verb from now (0 is the next): before it does anything, or after all of it."""
        self._traps.append(_Trap(len(self.steps) + step, None, when, error or BackendFailure(f"Injected at {step}.")))

    def fail_next(self, verb: str, *, when: When = "before", error: ShuteyeError | None = None) -> None:
        """Fail the next call of `verb`."""
        self._traps.append(_Trap(None, verb, when, error or BackendFailure(f"Injected in {verb}.")))

    def clear(self) -> None:
        """Forget the recorded steps and every failure still to come."""
        self.steps.clear()
        self._traps.clear()

    @contextmanager
    def _step(self, verb: str) -> Iterator[None]:
        step = len(self.steps)
        self.steps.append(verb)
        trap = next((trap for trap in self._traps if trap.springs(step, verb)), None)
        if trap:
            self._traps.remove(trap)
            if trap.when == "before":
                raise trap.error
        yield
        if trap:
            raise trap.error

    def reserve(self, nbytes: int) -> int:
        """See `MemoryBackend`."""
        with self._step("reserve"):
            return self._inner.reserve(nbytes)

    def unreserve(self, address: int, nbytes: int) -> None:
        """See `MemoryBackend`."""
        with self._step("unreserve"):
            self._inner.unreserve(address, nbytes)

    def commit(self, address: int, nbytes: int) -> None:
        """See `MemoryBackend`; the memory is filled with poison."""
        with self._step("commit"):
            if self.available is not None and nbytes > self.available:
                raise MemoryExhausted(f"{nbytes:,} bytes are needed and {self.available:,} are available.")
            self._inner.commit(address, nbytes)
            ctypes.memset(address, POISON, nbytes)

    def map_file(self, address: int, nbytes: int, *, fd: int, offset: int) -> None:
        """See `MemoryBackend`."""
        with self._step("map_file"):
            self._inner.map_file(address, nbytes, fd=fd, offset=offset)

    def populate(self, address: int, nbytes: int) -> None:
        """See `MemoryBackend`."""
        with self._step("populate"):
            self._inner.populate(address, nbytes)

    def release(self, address: int, nbytes: int) -> None:
        """See `MemoryBackend`."""
        with self._step("release"):
            self._inner.release(address, nbytes)

    def written_ranges(self, address: int, nbytes: int) -> tuple[tuple[int, int], ...]:
        """See `MemoryBackend`."""
        with self._step("written_ranges"):
            return self._inner.written_ranges(address, nbytes)

    def resident_bytes(self, address: int, nbytes: int) -> int:
        """See `MemoryBackend`."""
        with self._step("resident_bytes"):
            return self._inner.resident_bytes(address, nbytes)

    def available_bytes(self) -> int:
        """See `MemoryBackend`."""
        with self._step("available_bytes"):
            return self._inner.available_bytes() if self.available is None else self.available

    def process_resident_bytes(self) -> int:
        """See `MemoryBackend`."""
        with self._step("process_resident_bytes"):
            return self._inner.process_resident_bytes()

    def write_file(self, address: int, nbytes: int, *, fd: int, offset: int) -> None:
        """See `MemoryBackend`."""
        with self._step("write_file"):
            self._inner.write_file(address, nbytes, fd=fd, offset=offset)

    def sync_file(self, fd: int) -> None:
        """See `MemoryBackend`."""
        with self._step("sync_file"):
            self._inner.sync_file(fd)
