"""Requests: admitted, held until their model is awake, or refused; each of them exactly once, by its deadline.

Which models are woken for those that are held is decided in `fleet/waking.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

from shuteye.errors import InternalError, InvalidRequest
from shuteye.fleet.actions import Admit, Refusal, Refuse
from shuteye.fleet.entry import Held, ModelEntry
from shuteye.fleet.events import RequestArrived, WakeAsked
from shuteye.fleet.fleet_state import FleetState
from shuteye.fleet.model_spec import SleepingPolicy, SleepOwner
from shuteye.fleet.phases import Phase
from shuteye.fleet.timers import Due
from shuteye.fleet.wake_rules import rule

MIN_RETRY_S = 1.0
"""Nobody is told to ask again sooner."""


class Requests:
    """Which requests there are, and what becomes of them."""

    def __init__(self, fleet: FleetState) -> None:
        self._fleet = fleet
        self._running: dict[str, ModelEntry] = {}
        self._held: dict[str, ModelEntry] = {}
        self._waiting: dict[str, ModelEntry] = {}

    @property
    def num_held(self) -> int:
        """How many requests wait."""
        return len(self._held)

    # --- arrivals -------------------------------------------------------------------------------

    def arrive(self, event: RequestArrived) -> None:
        """A request for a model.

        Raises:
            ModelNotFound: there is no such model.
            InvalidRequest: another request under way has its id.
        """
        fleet, entry = self._fleet, self._fleet.entry(event.model)
        self._require_new(event.request_id)
        entry.count_request(fleet.now, fleet.settings.half_life_s)
        if event.keep_alive_s is not None:
            entry.keep_alive_s = event.keep_alive_s
        self._take(entry, Held(event.request_id, fleet.now, event.deadline))

    def arrive_by_operator(self, event: WakeAsked) -> None:
        """An operator's wake, which is like a request that is over once it is admitted.

        Raises:
            ModelNotFound, InvalidRequest: as for a request.
        """
        entry = self._fleet.entry(event.model)
        self._require_new(event.request_id)
        entry.asked_depth = None
        if entry.phase is not Phase.AWAKE:
            entry.owner, entry.lease_id = SleepOwner.FLEET, None
        self._take(entry, Held(event.request_id, self._fleet.now, event.deadline, by_operator=True))

    def _require_new(self, request_id: str) -> None:
        if request_id in self._running or request_id in self._held:
            raise InvalidRequest(f"There is a request {request_id!r} under way.", param="request_id")

    def _take(self, entry: ModelEntry, request: Held) -> None:
        if entry.retiring:
            self._refuse(entry, request, Refusal.REMOVED)
        elif entry.phase is Phase.AWAKE:
            self._admit(entry, request)
        elif request.deadline <= self._fleet.now:
            self._refuse(entry, request, Refusal.DEADLINE)
        elif self.num_held >= self._fleet.settings.max_held and not request.by_operator:
            self._refuse(entry, request, Refusal.QUEUE_FULL)
        else:
            self._hold(entry, request)

    def _hold(self, entry: ModelEntry, request: Held) -> None:
        entry.held[request.request_id] = request
        self._held[request.request_id] = entry
        self._fleet.timers.set((Due.DEADLINE, request.request_id), request.deadline)
        self._fleet.touch(entry)
        self.review(entry)

    # --- ends -----------------------------------------------------------------------------------

    def finish(self, request_id: str) -> ModelEntry:
        """A request has ended, or its client has gone while it was held; returns its model.

        Raises:
            InternalError: there is no such request.
        """
        entry = self._running.pop(request_id, None)
        if entry is not None:
            entry.running -= 1
            entry.used_at = self._fleet.now
            if not entry.running:
                self._fleet.touch(entry)
            return entry
        if request_id in self._held:
            return self._drop(request_id)
        raise InternalError(f"There is no request {request_id!r} that could finish.")

    def expire(self, request_id: str) -> None:
        """The deadline of a held request has come."""
        entry = self._held[request_id]
        self._refuse_held(entry, entry.held[request_id], Refusal.DEADLINE)

    def refuse_all(self, entry: ModelEntry, why: Refusal, detail: str = "") -> None:
        """Refuse whatever waits for a model."""
        for request in tuple(entry.held.values()):
            self._refuse_held(entry, request, why, detail)

    def refuse_leased(self, entry: ModelEntry) -> None:
        """Refuse what waits for a model that has no room before a lease ends, and cannot wait for that."""
        over = self._fleet.next_lease_end
        for request in tuple(entry.held.values()):
            if over is not None and over > request.deadline:
                self._refuse_held(entry, request, Refusal.LEASED)

    def admit_all(self, entry: ModelEntry) -> None:
        """A model has woken: let run what waited for it, and could wait for so long."""
        for request in tuple(entry.held.values()):
            if request.deadline < self._fleet.now:
                self._refuse_held(entry, request, Refusal.DEADLINE)
            else:
                self._drop(request.request_id)
                self._admit(entry, request)

    def _drop(self, request_id: str) -> ModelEntry:
        """Hold a request no longer."""
        entry = self._held.pop(request_id)
        del entry.held[request_id]
        self._fleet.timers.cancel((Due.DEADLINE, request_id))
        if not entry.held:
            self._fleet.touch(entry)
            self.review(entry)
        return entry

    def _admit(self, entry: ModelEntry, request: Held) -> None:
        fleet = self._fleet
        fleet.actions.append(Admit(request.request_id, entry.name, fleet.now - request.arrived))
        fleet.ranking.revalue(entry, fleet.now)
        if not request.by_operator:
            self._running[request.request_id] = entry
            entry.running += 1
        if entry.running <= 1:
            fleet.touch(entry)

    def _refuse_held(self, entry: ModelEntry, request: Held, why: Refusal, detail: str = "") -> None:
        self._drop(request.request_id)
        self._refuse(entry, request, why, detail)

    def _refuse(self, entry: ModelEntry, request: Held, why: Refusal, detail: str = "") -> None:
        retry = None if why in _FOR_OPERATORS else self.retry_after_s(entry)
        if why is Refusal.LEASED and self._fleet.next_lease_end is not None:
            retry = max(retry or 0.0, self._fleet.next_lease_end - self._fleet.now)
        text = _DETAILS[why].format(model=entry.name, held=self.num_held, owner=entry.owner.value)
        self._fleet.actions.append(Refuse(request.request_id, entry.name, why, retry, f"{text} {detail}".strip()))

    def retry_after_s(self, entry: ModelEntry) -> float:
        """When it is worth asking again: after what a wake takes; if a lease holds the room, once that is over."""
        wake_s = max(MIN_RETRY_S, entry.wake_cost_s(entry.depth))
        over = self._lease_over_at(entry)
        return wake_s if over is None else max(wake_s, over - self._fleet.now)

    def _lease_over_at(self, entry: ModelEntry) -> float | None:
        """When the lease is over that keeps a model asleep; None if none does."""
        return None if entry.lease_id is None else self._fleet.timers.at((Due.LEASE_OVER, entry.lease_id))

    # --- who waits ------------------------------------------------------------------------------

    def review(self, entry: ModelEntry) -> None:
        """Decide anew what becomes of the requests that a model holds: its owner, pause or queue has changed."""
        for request in tuple(entry.held.values()):
            why = self._objection(entry, request)
            if why is not None:
                self._refuse_held(entry, request, why)
        if entry.phase is Phase.ASLEEP and any(self._may_wake(entry, one) for one in entry.held.values()):
            self._waiting[entry.name] = entry
            if entry.waiting_since is None:
                entry.waiting_since = self._fleet.now
            self._fleet.changed = True
        else:
            self._waiting.pop(entry.name, None)
            entry.waiting_since = None

    def _objection(self, entry: ModelEntry, request: Held) -> Refusal | None:
        """Why a request is not to wait."""
        if request.by_operator or entry.phase in (Phase.AWAKE, Phase.WAKING):
            return None
        if entry.paused and entry.refuses:
            return Refusal.PAUSED
        if self._rule(entry) == "reject":
            return Refusal.LEASED if entry.owner is SleepOwner.LEASE else Refusal.SLEEPING
        over = self._lease_over_at(entry)
        if self._rule(entry) == "hold" and over is not None and over > request.deadline:
            return Refusal.LEASED
        return None

    def _may_wake(self, entry: ModelEntry, request: Held) -> bool:
        return request.by_operator or (not entry.paused and self._rule(entry) == "wake")

    def _rule(self, entry: ModelEntry) -> SleepingPolicy:
        owner = SleepOwner.OPERATOR if entry.asked_depth is not None else entry.owner
        return rule(owner, entry.spec.on_sleeping_request)

    def waiting(self) -> Iterator[ModelEntry]:
        """Models that requests may wake, in the order in which they get room."""
        return iter(sorted(self._waiting.values(), key=lambda entry: (-entry.spec.priority, entry.waiting_since)))

    @property
    def any_waiting(self) -> bool:
        """Whether a model waits for room."""
        return bool(self._waiting)


_FOR_OPERATORS = frozenset({Refusal.REMOVED, Refusal.SLEEPING})

_DETAILS = {
    Refusal.DEADLINE: "{model} was not awake in time.",
    Refusal.QUEUE_FULL: "{held} requests wait already, as many as may.",
    Refusal.NO_ROOM: "{model} does not fit beside what may not be put to sleep.",
    Refusal.SLEEPING: "{model} was put to sleep by an operator, and wakes only when told to.",
    Refusal.LEASED: "{model} has no room before a lease ends.",
    Refusal.PAUSED: "{model} is paused, and takes no new requests until it is resumed.",
    Refusal.WAKE_FAILED: "{model} could not be woken.",
    Refusal.REMOVED: "{model} is no longer part of the fleet.",
}
