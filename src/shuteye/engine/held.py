"""Requests that arrived while the gate was closed and wait for it to open: a bounded queue with deadlines."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from shuteye.errors import ErrorInfo, ModelSleeping, QueueFull
from shuteye.tasks.base import RequestDelta, id_in_use
from shuteye.tasks.table import Request


@dataclass(frozen=True, slots=True)
class _Held:
    request: Request
    deadline: float | None  # monotonic seconds; None waits for ever


class HeldRequests:
    """A bounded first-in-first-out queue; each request may have a deadline."""

    def __init__(self, *, limit: int) -> None:
        self._limit = limit
        self._held: dict[str, _Held] = {}

    def __len__(self) -> int:
        return len(self._held)

    @property
    def next_deadline(self) -> float | None:
        """The earliest deadline, in monotonic seconds."""
        return min((held.deadline for held in self._held.values() if held.deadline is not None), default=None)

    def add(self, request: Request, *, deadline: float | None) -> None:
        """Hold a request.

        Raises:
            InvalidRequest: the id is in use.
            QueueFull: as many are held as may be.
        """
        if request.request_id in self._held:
            raise id_in_use(request.request_id)
        if len(self._held) >= self._limit:
            raise QueueFull(f"{self._limit} requests are held already; try again once the model is awake.")
        self._held[request.request_id] = _Held(request, deadline)

    def take(self) -> list[Request]:
        """All held requests, oldest first; the queue is empty afterwards."""
        held, self._held = self._held, {}
        return [entry.request for entry in held.values()]

    def bound(self, deadline: float) -> None:
        """Give a deadline to those that only a pause had held: the model is asleep now, and none waits for ever."""
        for request_id, held in self._held.items():
            if held.deadline is None:
                self._held[request_id] = replace(held, deadline=deadline)

    def unbound(self) -> None:
        """Take the deadlines away: the model is awake, and whoever is held yet waits for `resume` alone."""
        for request_id, held in self._held.items():
            self._held[request_id] = replace(held, deadline=None)

    def abort(self, request_ids: Iterable[str]) -> list[RequestDelta]:
        """End those of the named requests that are held here."""
        found = [request_id for request_id in request_ids if self._held.pop(request_id, None)]
        return [RequestDelta(request_id, finish_reason="abort") for request_id in found]

    def abort_all(self) -> list[RequestDelta]:
        """End every held request."""
        return self.abort(tuple(self._held))

    def expire(self, now: float) -> list[RequestDelta]:
        """Refuse, as if the model had just been found asleep, those whose deadline has passed."""
        late = [key for key, held in self._held.items() if held.deadline is not None and held.deadline <= now]
        for request_id in late:
            del self._held[request_id]
        error = ErrorInfo(kind=ModelSleeping.__name__, message=ModelSleeping.MESSAGE)
        return [RequestDelta(request_id, error=error) for request_id in late]

    def fail(self, error: ErrorInfo) -> list[RequestDelta]:
        """End every held request with an error."""
        return [RequestDelta(request.request_id, error=error) for request in self.take()]
