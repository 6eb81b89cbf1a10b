"""What the parts of the scheduler share: all models, the sums over them, times, and the actions decided so far.

Only here do models move, so that sums, ranking and times are always in step with them.
"""

from __future__ import annotations

from collections.abc import Iterable

from shuteye.errors import ModelNotFound
from shuteye.fleet.actions import AnyAction, Sleep, Wake
from shuteye.fleet.entry import ModelEntry
from shuteye.fleet.model_spec import Depth, SleepOwner
from shuteye.fleet.phases import Move, Phase
from shuteye.fleet.ranking import Ranking, Victim
from shuteye.fleet.room import Room
from shuteye.fleet.settings import FleetSettings
from shuteye.fleet.timers import Due, Timers

RECHECK = (Due.RECHECK, "")
"""One time for all who wait for something that time alone brings: then everything is looked at again."""


class FleetState:
    """All models of a fleet.

    Attributes:
        awake: those of them that are awake.
        now: when the event that is being handled happened.
        actions: what has been decided for it.
        next_lease_end: when the first of the granted leases ends, if none is renewed; None if there is none.
        changed: there may be room for somebody who waits; looked at, and unset, by the scheduler.
    """

    def __init__(self, budget_bytes: int, settings: FleetSettings) -> None:
        self.settings = settings
        self.entries: dict[str, ModelEntry] = {}
        self.awake: dict[str, ModelEntry] = {}
        self.room = Room(budget_bytes)
        self.ranking = Ranking(settings)
        self.timers = Timers()
        self.now = 0.0
        self.actions: list[AnyAction] = []
        self.next_lease_end: float | None = None
        self.changed = False

    def entry(self, model: str) -> ModelEntry:
        """The model of that name.

        Raises:
            ModelNotFound: there is none.
        """
        found = self.entries.get(model)
        if found is None:
            raise ModelNotFound(f"There is no model {model!r} in the fleet.", param="model")
        return found

    # --- moves ----------------------------------------------------------------------------------

    def wake(self, entry: ModelEntry) -> None:
        """Begin to wake a model, for which there is room."""
        entry.begin(Move.WAKE, Depth.AWAKE)
        entry.waiting_since = None
        self.timers.cancel((Due.ESCALATE, entry.name))
        self.actions.append(Wake(entry.name, entry.depth))
        self.refresh(entry)

    def sleep(self, entry: ModelEntry, depth: Depth, owner: SleepOwner) -> None:
        """Begin to put a model to sleep, or to a deeper one, which keeps on whose behalf it sleeps."""
        if entry.phase is Phase.AWAKE:
            entry.keep_alive_s = None
            entry.owner = owner
        entry.begin(Move.SLEEP, depth)
        self.timers.cancel((Due.IDLE, entry.name))
        self.timers.cancel((Due.ESCALATE, entry.name))
        self.actions.append(Sleep(entry.name, depth, entry.owner))
        self.refresh(entry)

    def evict(self, victims: Iterable[Victim], owner: SleepOwner) -> int:
        """Put `victims` to sleep; returns how many bytes that will free."""
        victims = tuple(victims)
        self.ranking.inflate(victim for victim in victims if victim.entry.phase is Phase.AWAKE)
        for victim in victims:
            self.sleep(victim.entry, victim.depth, owner)
        return sum(victim.freed_bytes for victim in victims)

    def refresh(self, entry: ModelEntry) -> None:
        """Bring everything in step with a model that has changed."""
        if self.room.count(entry):
            self.changed = True
        if entry.phase is Phase.AWAKE:
            self.awake[entry.name] = entry
        else:
            self.awake.pop(entry.name, None)
        self.touch(entry)

    def touch(self, entry: ModelEntry) -> None:
        """The same for a model that takes what it took, but has become idle, or no longer is."""
        if self.ranking.place(entry):
            self.changed = True
        self._time_idleness(entry)

    def forget(self, entry: ModelEntry) -> None:
        """There is no such model any more."""
        self.room.forget(entry)
        self.ranking.remove(entry)
        for due in (Due.IDLE, Due.ESCALATE):
            self.timers.cancel((due, entry.name))
        del self.entries[entry.name]
        self.changed = True

    # --- idleness -------------------------------------------------------------------------------

    def may_idle(self, entry: ModelEntry) -> bool:
        """Whether a model that is awake does nothing, and nobody wants it awake."""
        return entry.phase is Phase.AWAKE and entry.is_idle and not entry.is_protected and not entry.retiring

    def _time_idleness(self, entry: ModelEntry) -> None:
        """Set when a model falls asleep, if it has just become idle; not, if it no longer is."""
        key = (Due.IDLE, entry.name)
        idle_s = entry.idle_s(self.settings)
        if idle_s < 0 or not self.may_idle(entry):
            self.timers.cancel(key)
        elif self.timers.at(key) is None:
            self.timers.set(key, max(self.now + idle_s, entry.no_sleep_until))

    def recheck_at(self, at: float) -> None:
        """Look at everything again at `at`, if not before."""
        if at > self.now:
            self.timers.set_earlier(RECHECK, at)
