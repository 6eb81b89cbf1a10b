"""No failure leaves a descriptor behind, and with it a lock: every system call of every way to an image fails once."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from memory_harness import build_image, open_fds

from shuteye.errors import BackendFailure, ShuteyeError
from shuteye.memory.backends.linux import LinuxBackend
from shuteye.memory.image import ImageIdentity
from shuteye.memory.image_store import ImageStore

IDENTITY = ImageIdentity("test/world-1", "1", "bfloat16")
OS_CALLS = ["open", "fstat", "stat", "utime", "unlink", "rename", "fsync", "ftruncate", "pread", "pwrite", "chmod"]
CALLS = [(fcntl, "flock"), *((os, name) for name in OS_CALLS)]


def build(store: ImageStore) -> None:
    store.open_or_build(IDENTITY, build_image(1)).close()


def reopen(store: ImageStore) -> None:
    image = store.open(IDENTITY)
    assert image is not None
    image.close()


MOVES: dict[str, tuple[bool, Callable[[ImageStore], object]]] = {
    # name: (whether there is an image before, the move)
    "build": (False, build),
    "open": (True, reopen),
    "list": (True, ImageStore.list),
    "verify": (True, lambda store: store.verify(IDENTITY.key)),
    "remove": (True, lambda store: store.remove(IDENTITY.key)),
}


class FailsOnce:
    """Calls through, but for the n-th call."""

    def __init__(self, inner: Callable[..., object], at: int) -> None:
        self.inner, self.at, self.calls = inner, at, 0

    def __call__(self, *args: object, **options: object) -> object:
        self.calls += 1
        if self.calls == self.at + 1:
            raise OSError(errno.EIO, "Input/output error")
        return self.inner(*args, **options)


@pytest.mark.parametrize(("module", "name"), CALLS, ids=[name for _, name in CALLS])
@pytest.mark.parametrize("move", MOVES)
def test_a_failed_call_leaves_no_descriptor(tmp_path: Path, monkeypatch, move: str, module, name: str) -> None:
    """Would catch a lock that outlives the failure, which keeps an image in use until the process ends."""
    exists, work = MOVES[move]
    for at in range(100):
        store = ImageStore(tmp_path / str(at))
        if exists:
            build(store)
        before = open_fds()
        with monkeypatch.context() as patched:
            failing = FailsOnce(getattr(module, name), at)
            patched.setattr(module, name, failing)
            with suppress(ShuteyeError, OSError):
                work(store)
        assert open_fds() == before, f"{name} number {at}"
        if failing.calls <= at:
            return
    raise AssertionError("the move never ended")


@pytest.mark.parametrize("trim", [0, 1])
def test_addresses_that_cannot_be_trimmed_are_given_back(trim: int) -> None:
    """Would catch a reservation that nobody knows of any more."""

    class Untrimmable(LinuxBackend):
        """Refuses one of the first two `unreserve`s."""

        def __init__(self) -> None:
            super().__init__()
            self.unreserved: list[int] = []

        def unreserve(self, address: int, nbytes: int) -> None:
            self.unreserved.append(nbytes)
            if len(self.unreserved) == trim + 1:
                raise BackendFailure("too many mappings")
            super().unreserve(address, nbytes)

    backend = Untrimmable()
    before = mapped_bytes()
    with pytest.raises(BackendFailure):
        backend.reserve(1 << 30)
    assert mapped_bytes() - before < 1 << 30


def mapped_bytes() -> int:
    """Address space of this process."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
