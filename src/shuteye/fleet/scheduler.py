"""Who is awake: events in, actions out, on a budget of bytes that is never exceeded. Pure: no I/O, no clock.

What events and actions are is in `fleet/events.py` and `fleet/actions.py`; why it decides as it does in ADR 32. Whoever
carries out its actions tells it how they went, and calls it again at `Scheduler.next_tick_at`:

    actions = scheduler.handle(event, now)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shuteye.errors import InternalError, InvalidRequest
from shuteye.fleet import events
from shuteye.fleet.actions import AnyAction
from shuteye.fleet.fleet_state import FleetState
from shuteye.fleet.leases import Leases
from shuteye.fleet.lifecycle import Lifecycle
from shuteye.fleet.model_spec import SleepOwner
from shuteye.fleet.requests import Requests
from shuteye.fleet.settings import FleetSettings
from shuteye.fleet.status import LeaseStatus, ModelStatus, RoomStatus, status_of
from shuteye.fleet.timers import Due
from shuteye.fleet.waking import Waking


class Scheduler:
    """The scheduler of one machine.

    Args:
        budget_bytes: what all models and leases may take together.
    """

    def __init__(self, budget_bytes: int, settings: FleetSettings | None = None) -> None:
        self._fleet = FleetState(_checked(budget_bytes), settings or FleetSettings())
        self._requests = Requests(self._fleet)
        self._waking = Waking(self._fleet, self._requests)
        self._leases = Leases(self._fleet, self._requests, self._waking)
        self._models = Lifecycle(self._fleet, self._requests, self._waking, self._leases)
        self._by_event = self._handlers()
        self._by_due: dict[Due, Callable[[str], None]] = {
            Due.LEASE_OVER: lambda lease_id: self._leases.end(lease_id, expired=True),
            Due.CLAIM_OVER: self._leases.give_up,
            Due.DEADLINE: self._requests.expire,
            Due.IDLE: self._models.sleep_idle,
            Due.ESCALATE: self._models.deepen,
            Due.RECHECK: lambda _: self._look_again(),
        }

    def handle(self, event: events.AnyEvent, now: float) -> tuple[AnyAction, ...]:
        """What is to be done, in this order, now that `event` has happened.

        Args:
            now: seconds; never less than before.

        Raises:
            ModelNotFound, InvalidRequest, TransitionConflict, LeaseGone: as the event says; it has changed nothing.
                What is due by now comes with the next event, which `next_tick_at` asks for at once.
            InternalError: the event cannot have happened, as the finish of a request that nobody has told of.
        """
        fleet = self._fleet
        if not now >= fleet.now:
            raise InternalError(f"Time went back from {fleet.now} to {now}.")
        fleet.now = now
        self._leases.expire()
        self._by_event[type(event)](event)
        for due, key in fleet.timers.due(now):
            self._by_due[due](key)
        if fleet.changed:
            self._settle()
        actions, fleet.actions = tuple(fleet.actions), []
        return actions

    @property
    def next_tick_at(self) -> float | None:
        """When something is due; None if only events can bring more. It may turn out that nothing is."""
        return self._fleet.now if self._fleet.actions else self._fleet.timers.next_at

    def _settle(self) -> None:
        """Give the room that there is to those who want it: what is too much first, then leases, then models."""
        self._fleet.changed = False
        if self._fleet.room.projected_free_bytes < 0:
            self._shrink()
        if self._leases.any_claimed:
            self._leases.free()
        if self._waking.is_wanted:
            self._waking.give_room()
        self._fleet.changed = False

    def _shrink(self) -> None:
        """The budget has become too small: put models to sleep, also those that have just woken."""
        fleet = self._fleet
        excess = -fleet.room.projected_free_bytes
        victims = fleet.ranking.choose(
            excess, fleet.now, lambda entry: entry.no_sleep_until <= fleet.now, as_many_as_possible=True
        )
        fleet.evict(victims, SleepOwner.FLEET)

    def _look_again(self) -> None:
        self._fleet.changed = True

    # --- events ---------------------------------------------------------------------------------

    def _handlers(self) -> dict[type, Callable[[Any], None]]:
        """What handles which event."""
        models, requests, leases = self._models, self._requests, self._leases
        return {
            events.ModelAdded: models.add,
            events.ModelChanged: models.change,
            events.ModelRemoved: models.remove,
            events.ModelLost: models.lose,
            events.RequestArrived: requests.arrive,
            events.RequestFinished: lambda event: models.retire(requests.finish(event.request_id)),
            events.KeepAliveChanged: models.keep_alive,
            events.TransitionFinished: models.finish,
            events.TransitionFailed: models.fail,
            events.ResidentMeasured: models.measure,
            events.BudgetChanged: self._change_budget,
            events.AvailableMeasured: self._measure_available,
            events.SleepAsked: models.sleep_by_operator,
            events.WakeAsked: models.wake_by_operator,
            events.PinChanged: models.pin,
            events.PauseChanged: models.pause,
            events.WeightSessionChanged: models.hold_weights,
            events.WeightsUpdated: models.update_weights,
            events.LeaseClaimed: leases.claim,
            events.LeaseRenewed: lambda event: leases.renew(event.lease_id, event.ttl_s),
            events.LeaseReleased: lambda event: leases.end(event.lease_id),
            events.LeaseUsed: lambda event: leases.use(event.lease_id, event.used_bytes),
            events.Tick: lambda _: None,
        }

    def _change_budget(self, event: events.BudgetChanged) -> None:
        self._fleet.room.set_budget(_checked(event.budget_bytes))
        self._fleet.changed = True

    def _measure_available(self, event: events.AvailableMeasured) -> None:
        taken = sum(entry.certain_bytes() for entry in self._fleet.entries.values()) + self._leases.used_bytes
        self._fleet.room.set_available(event.available_bytes, taken)
        self._fleet.changed = True

    # --- what others are told -------------------------------------------------------------------

    def model(self, name: str) -> ModelStatus:
        """One model, now.

        Raises:
            ModelNotFound: there is none of that name.
        """
        return status_of(self._fleet.entry(name), self._fleet.timers)

    def models(self) -> tuple[ModelStatus, ...]:
        """All models, now, in the order in which they were added."""
        return tuple(status_of(entry, self._fleet.timers) for entry in self._fleet.entries.values())

    def leases(self) -> tuple[LeaseStatus, ...]:
        """All leases and claims, now."""
        return tuple(lease.status() for lease in self._leases)

    def room(self) -> RoomStatus:
        """The budget, now."""
        room = self._fleet.room
        return RoomStatus(
            budget_bytes=room.budget_bytes,
            charged_bytes=room.charged_bytes,
            leased_bytes=room.leased_bytes,
            claimed_bytes=room.claimed_bytes,
            held_requests=self._requests.num_held,
        )


def _checked(budget_bytes: int) -> int:
    if budget_bytes < 0:
        raise InvalidRequest(f"The memory budget must be at least 0, got {budget_bytes}.", param="memory_budget")
    return budget_bytes
