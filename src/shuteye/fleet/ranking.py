"""Which models to put to sleep for others: GreedyDual-Size-Frequency, by measured cost and bytes.

A model's value is H = L + frequency × seconds that its next wake costs / bytes that its sleep frees, taken when it was
last used; the lowest goes first, and L becomes the value of what went, so that what is not used any more ages
(Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy", HP Labs HPL-98-69R1,
1998). Unlike there, several may have to go at once, and a set is bettered: none goes that is not needed, and one alone
if it costs no more than many.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from shuteye.fleet.entry import ModelEntry
from shuteye.fleet.model_spec import Depth
from shuteye.fleet.phases import Phase
from shuteye.fleet.settings import FleetSettings

MAX_VICTIMS = 64
"""How many models are put to sleep for one at most."""

_SCALE = 2.0**30
"""Values are seconds per GiB."""


@dataclass(frozen=True, slots=True)
class Victim:
    """A model that is to sleep.

    Attributes:
        loss_s: how many seconds of waking that costs the requests to come, by how frequent they were.
    """

    entry: ModelEntry
    depth: Depth
    freed_bytes: int
    loss_s: float


class _Sorted:
    """Models by value, the lowest first."""

    def __init__(self) -> None:
        self._ranks: list[tuple[float, str]] = []
        self._entries: dict[str, ModelEntry] = {}
        self._sizes: dict[str, int] = {}
        self.nbytes = 0

    def __iter__(self) -> Iterator[ModelEntry]:
        return (self._entries[name] for _, name in self._ranks)

    def add(self, entry: ModelEntry) -> None:
        rank = (entry.value, entry.name)
        insort(self._ranks, rank)
        self._entries[entry.name] = entry
        self._sizes[entry.name] = entry.charged_bytes
        self.nbytes += entry.charged_bytes
        entry.rank = rank

    def discard(self, entry: ModelEntry) -> None:
        if entry.rank is not None and entry.name in self._entries:
            del self._ranks[bisect_left(self._ranks, entry.rank)]
            del self._entries[entry.name]
            self.nbytes -= self._sizes.pop(entry.name)
            entry.rank = None


class Ranking:
    """All models that may be evicted: those awake, and those that sleep but could sleep more deeply.

    Attributes:
        inflation: GreedyDual's L.
    """

    def __init__(self, settings: FleetSettings) -> None:
        self._settings = settings
        self._awake, self._asleep = _Sorted(), _Sorted()
        self.inflation = 0.0

    def revalue(self, entry: ModelEntry, now: float) -> None:
        """`entry` has just been used."""
        entry.value = self.value_of(entry, now)

    def value_of(self, entry: ModelEntry, now: float) -> float:
        """What `entry` is worth if it is used now."""
        depth = self._settings.evict_depth
        freed = max(1, entry.awake_bytes - entry.expected_bytes(depth))
        frequency = entry.frequency_at(now, self._settings.half_life_s)
        return self.inflation + frequency * entry.wake_cost_s(depth) * _SCALE / freed

    def place(self, entry: ModelEntry) -> bool:
        """Have `entry` among those that may be evicted, if it may; True if it was not before."""
        was_there = entry.rank is not None
        self.remove(entry)
        if not entry.is_evictable:
            return False
        (self._awake if entry.phase is Phase.AWAKE else self._asleep).add(entry)
        return not was_there

    def remove(self, entry: ModelEntry) -> None:
        """Have `entry` no longer among them."""
        self._awake.discard(entry)
        self._asleep.discard(entry)

    @property
    def evictable_bytes(self) -> int:
        """What all of them are counted with: no more than that can be freed."""
        return self._awake.nbytes + self._asleep.nbytes

    def inflate(self, victims: Iterable[Victim]) -> None:
        """`victims` go: what is used from now on is worth more than they were."""
        self.inflation = max([self.inflation, *(victim.entry.value for victim in victims)])

    def choose(
        self, nbytes: int, now: float, may: Callable[[ModelEntry], bool], *, as_many_as_possible: bool = False
    ) -> tuple[Victim, ...]:
        """Who is to sleep so that `nbytes` become free; nobody if they cannot.

        Args:
            may: whether a model that is idle and not protected may be evicted.
            as_many_as_possible: if they cannot, free what can be.
        """
        if nbytes > self.evictable_bytes and not as_many_as_possible:
            return ()
        awake = [entry for entry in self._awake if may(entry)]
        found: list[Victim] = []
        for depth in sorted({self._settings.evict_depth, Depth.UNLOADED}):
            asleep = (entry for entry in self._asleep if may(entry))
            everybody = heapq.merge(awake, asleep, key=lambda entry: entry.value)
            for pool in (everybody, awake):  # without sleepers if it takes too many of them
                found = self._cheapest(pool, depth, nbytes, now)
                if _freed(found) >= nbytes:
                    return tuple(self._bettered(found, awake, depth, nbytes, now))
        return tuple(found) if as_many_as_possible else ()

    def _cheapest(self, pool: Iterable[ModelEntry], depth: Depth, nbytes: int, now: float) -> list[Victim]:
        """Of `pool` as many as are needed, in its order, but no more than may be."""
        found: list[Victim] = []
        freed = 0
        for entry in pool:
            victim = self._victim(entry, depth, now)
            if victim is None:
                continue
            found.append(victim)
            freed += victim.freed_bytes
            if freed >= nbytes or len(found) == MAX_VICTIMS:
                break
        return found

    def _victim(self, entry: ModelEntry, depth: Depth, now: float) -> Victim | None:
        """What putting `entry` to sleep at `depth`, or as deep as it may, would give; None if nothing."""
        reached = min(depth, entry.deepest) if entry.phase is Phase.AWAKE else entry.deepest
        freed = entry.freed_bytes(reached)
        if freed <= 0:
            return None
        cost = entry.wake_cost_s(reached)
        if entry.phase is not Phase.AWAKE:
            cost = max(0.0, cost - entry.wake_cost_s(entry.depth))
        return Victim(entry, reached, freed, entry.frequency_at(now, self._settings.half_life_s) * cost)

    def _bettered(
        self, found: list[Victim], awake: list[ModelEntry], depth: Depth, nbytes: int, now: float
    ) -> list[Victim]:
        """`found` without those that are not needed, or one that does alone and costs no more."""
        spare = _freed(found) - nbytes
        kept = []
        for victim in found:
            if victim.freed_bytes <= spare:
                spare -= victim.freed_bytes
            else:
                kept.append(victim)
        if len(kept) == 1:
            return kept
        alone = (self._victim(entry, depth, now) for entry in awake)
        enough = [victim for victim in alone if victim is not None and victim.freed_bytes >= nbytes]
        best = min(enough, key=lambda victim: victim.loss_s, default=None)
        return [best] if best is not None and best.loss_s <= sum(victim.loss_s for victim in kept) else kept


def _freed(victims: Iterable[Victim]) -> int:
    return sum(victim.freed_bytes for victim in victims)
