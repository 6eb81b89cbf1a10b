"""A lease of a server's memory as a context: taken at its begin, renewed while it lasts, given back at its end."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import msgspec

from shuteye.errors import LeaseGone, ShuteyeError

logger = logging.getLogger(__name__)

RENEWALS = 3
"""So often within its time a lease is renewed: two may fail."""


@dataclass(frozen=True, slots=True)
class LeaseGrant:
    """What a server says of a lease that it has granted.

    Attributes:
        slept: the models that sleep for it.
        freed_bytes: what that gave back, by the account of the server's system.
        restore_s: what waking them again should take.
    """

    id: str
    bytes: int
    expires_in_s: float
    slept: tuple[str, ...]
    freed_bytes: int
    restore_s: float


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """What is asked for; as `POST /v1/leases` has it."""

    bytes: int
    within_s: float = 10.0
    ttl_s: float = 600.0
    holder: str = ""
    priority: int = 0
    may_sleep: Sequence[str] | None = None
    restore: bool = True


@dataclass
class Lease:
    """Memory that is free for whoever is in this context.

    Renewed in the background, by a thread that ends with it. A holder that dies renews nothing, and loses it.

    Attributes:
        grant: what the server said; there is one within the context.
        lost: set if it is over although it was not given back, as after an outage that was longer than `ttl_s`.

    Raises:
        ShuteyeError: at the begin, the bytes cannot be had.
    """

    request: LeaseRequest
    claim: Callable[[LeaseRequest], LeaseGrant]
    renew: Callable[[str, float], object]
    release: Callable[[str], object]
    grant: LeaseGrant = field(init=False)
    lost: threading.Event = field(default_factory=threading.Event)
    _over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        self.grant = self.claim(self.request)
        self._thread = threading.Thread(target=self._keep, name="shuteye-lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        if self.lost.is_set():
            return
        try:
            self.release(self.grant.id)
        except LeaseGone:
            self.lost.set()

    def _keep(self) -> None:
        while not self._over.wait(self.request.ttl_s / RENEWALS):
            try:
                self.renew(self.grant.id, self.request.ttl_s)
            except LeaseGone:
                logger.error("The lease %s is over: its memory may belong to others by now.", self.grant.id)  # noqa: TRY400
                self.lost.set()
                return
            except ShuteyeError as problem:
                logger.warning("The lease %s could not be renewed, and is tried again: %s", self.grant.id, problem)


def body_of(request: LeaseRequest) -> dict[str, object]:
    """What is sent for it."""
    body: dict[str, object] = msgspec.to_builtins(request)
    return body
