"""Gives room to models that wait for it: to requests' first, then to those that are to be awake without one."""

from __future__ import annotations

import math

from shuteye.fleet.actions import Refusal
from shuteye.fleet.entry import ModelEntry
from shuteye.fleet.fleet_state import FleetState
from shuteye.fleet.model_spec import SleepOwner
from shuteye.fleet.phases import Phase
from shuteye.fleet.ranking import Victim
from shuteye.fleet.requests import Requests

RARE = 16.0
"""How many times less than the average of those that are awake a model is used that is rare."""


class Waking:
    """Who wakes next, and who sleeps for that."""

    def __init__(self, fleet: FleetState, requests: Requests) -> None:
        self._fleet = fleet
        self._requests = requests
        self._wished: dict[str, ModelEntry] = {}

    def wish(self, entry: ModelEntry) -> None:
        """Wake a model once there is room that nobody else waits for; nothing is evicted for it."""
        self._wished[entry.name] = entry
        self._fleet.changed = True

    def wish_no_longer(self, entry: ModelEntry) -> None:
        """Do not."""
        self._wished.pop(entry.name, None)

    @property
    def is_wanted(self) -> bool:
        """Whether anybody would take room."""
        return self._requests.any_waiting or bool(self._wished)

    # --- requests -------------------------------------------------------------------------------

    def give_room(self) -> None:
        """Wake what there is room for, and put others to sleep for the rest, in the order of `Requests.waiting`.

        Who waits for sleeps under way keeps what they will free, and who has waited for long keeps all: later ones get
        only what is left.
        """
        room = self._fleet.room
        free, projected = room.free_bytes - room.claimed_bytes, room.projected_free_bytes - room.claimed_bytes
        for entry in self._requests.waiting():
            need = entry.awake_bytes - entry.charged_bytes
            if not room.could_ever_fit(entry) and self._refuse(entry):
                continue
            if need > projected:
                projected += self._evict_for(entry, need - projected)
                if need > projected and self._has_waited(entry):
                    return
            if need <= projected:
                projected -= need
                if need <= free:
                    free -= need
                    self._wake(entry)
        if not self._requests.any_waiting:
            self._grant_wishes(min(free, projected))

    def _wake(self, entry: ModelEntry) -> None:
        self._fleet.wake(entry)
        self._requests.review(entry)
        self.wish_no_longer(entry)

    def _has_waited(self, entry: ModelEntry) -> bool:
        """Whether `entry` has waited so long that others may no longer pass it."""
        assert entry.waiting_since is not None
        until = entry.waiting_since + self._fleet.settings.fairness_s
        self._fleet.recheck_at(until)
        return until <= self._fleet.now

    def _refuse(self, entry: ModelEntry) -> bool:
        """Refuse what waits for a model that cannot fit, unless the end of a lease may help in time."""
        if self._fleet.room.could_ever_fit(entry, without_leases=True):
            self._requests.refuse_leased(entry)
            return not entry.held
        taken = self._fleet.room.floor_bytes - entry.floor_bytes
        self._requests.refuse_all(
            entry,
            Refusal.NO_ROOM,
            f"It takes {entry.awake_bytes:,} bytes; the budget is {self._fleet.room.budget_bytes:,}, "
            f"of which {taken:,} stay taken by what is pinned, paused or asleep.",
        )
        return True

    # --- evictions ------------------------------------------------------------------------------

    def _evict_for(self, entry: ModelEntry, nbytes: int) -> int:
        """Put others to sleep for `entry`, unless it had better wait a moment; returns what that frees."""
        fleet = self._fleet
        victims = fleet.ranking.choose(nbytes, fleet.now, lambda other: self._may_evict(other, entry))
        if not victims:
            return 0
        until = self._batch_at(entry, victims)
        if until > fleet.now:
            fleet.recheck_at(until)
            return 0
        return fleet.evict(victims, SleepOwner.FLEET)

    def _may_evict(self, other: ModelEntry, entry: ModelEntry) -> bool:
        if other is entry or other.spec.priority > entry.spec.priority:
            return False
        at = other.evictable_at(self._fleet.settings)
        self._fleet.recheck_at(at)
        return at <= self._fleet.now

    # Rare models that are used by turns, and do not fit beside those that are busy, would displace each other, or one
    # of these, at every request. So each may stay for a multiple of what its wake and the next one cost; meanwhile
    # requests for the others gather, and one wake serves them all. The first after a while finds nobody just woken.

    def _batch_at(self, entry: ModelEntry, victims: tuple[Victim, ...]) -> float:
        """When `entry` may displace `victims`: at once, unless it is rare, and they have just woken or are busy."""
        settings = self._fleet.settings
        first = next(iter(entry.held.values()))
        awake = [victim.entry for victim in victims if victim.entry.phase is Phase.AWAKE]
        if len(entry.held) >= settings.batch_requests or first.by_operator or not self._is_rare(entry):
            return self._fleet.now
        assert entry.waiting_since is not None
        cost_s = entry.wake_cost_s(entry.depth) + sum(victim.entry.wake_cost_s(victim.depth) for victim in victims)
        since = max((self._undisturbed_since(other, entry) for other in awake), default=-math.inf)
        patience_s = min(settings.batch_wait_s, (first.deadline - first.arrived) / 2)
        return min(since + settings.batch_factor * cost_s, entry.waiting_since + patience_s)

    def _undisturbed_since(self, other: ModelEntry, entry: ModelEntry) -> float:
        """Since when `other` has had its memory; if it is much busier than `entry`, since `entry` has asked for it."""
        assert entry.waiting_since is not None
        return entry.waiting_since if self._frequency(other) > RARE * self._frequency(entry) else other.awake_since

    def _is_rare(self, entry: ModelEntry) -> bool:
        """Whether `entry` is used much less than those that are awake, on average."""
        busy = sum(map(self._frequency, self._fleet.awake.values()))
        return self._frequency(entry) * RARE * len(self._fleet.awake) < busy

    def _frequency(self, entry: ModelEntry) -> float:
        return entry.frequency_at(self._fleet.now, self._fleet.settings.half_life_s)

    # --- wakes without a request ----------------------------------------------------------------

    def _grant_wishes(self, free: int) -> None:
        for entry in sorted(self._wished.values(), key=lambda one: -one.spec.priority):
            if entry.phase is Phase.AWAKE or entry.retiring:
                self.wish_no_longer(entry)
                continue
            need = entry.awake_bytes - entry.charged_bytes
            if entry.phase is not Phase.ASLEEP or need > free:
                continue
            free -= need
            self._wake(entry)
