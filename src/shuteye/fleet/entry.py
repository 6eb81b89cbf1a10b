"""One model as the scheduler sees it: where it is, what it takes by measurement, and what keeps it awake."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shuteye.fleet.model_spec import Depth, ModelSpec, SleepOwner
from shuteye.fleet.phases import Move, Phase, after
from shuteye.fleet.settings import FleetSettings


@dataclass(frozen=True, slots=True)
class Held:
    """A request that waits for its model.

    Attributes:
        by_operator: a call to wake the model: it may do so whoever put it to sleep, and is over once that is done.
    """

    request_id: str
    arrived: float
    deadline: float
    by_operator: bool = False


class ModelEntry:
    """A model's state. Changed by `fleet/fleet_state.py` only, which keeps the sums over all models in step.

    Attributes:
        depth: where it is; during a transition where that began.
        target: where the transition under way leads.
        owner: on whose behalf it sleeps, or is falling asleep; that of the last sleep while it is awake.
        resident_bytes: what it took when last measured in its present phase.
        measured: at each depth, what it took right after it got there.
        wake_s: from each depth, how long the last wake took.
        used_at: when a request came or ended last.
        running: requests admitted and not yet told as finished.
        held: requests that wait for it, in the order in which they came.
        waiting_since: since when a request has been waiting for room; None if none does.
        lease_id: the lease that it sleeps for.
        asked_depth: how deep an operator wants it asleep once the transition under way has ended.
        charged_bytes, projected_bytes, floor_bytes: as last summed up in `fleet/room.py`.
        rank: its key among those that may be evicted; None if it may not.
    """

    __slots__ = (
        "asked_depth",
        "awake_since",
        "charged_bytes",
        "counted_at",
        "depth",
        "floor_bytes",
        "frequency",
        "held",
        "keep_alive_s",
        "lease_id",
        "measured",
        "name",
        "no_sleep_until",
        "owner",
        "paused",
        "phase",
        "pinned",
        "projected_bytes",
        "rank",
        "refuses",
        "resident_bytes",
        "retiring",
        "running",
        "spec",
        "target",
        "used_at",
        "value",
        "waiting_since",
        "wake_s",
        "weight_session",
        "weights_updated",
    )

    def __init__(self, spec: ModelSpec, depth: Depth, resident_bytes: int | None, now: float) -> None:
        self.name = spec.name
        self.spec = spec
        self.phase = Phase.AWAKE if depth is Depth.AWAKE else Phase.ASLEEP
        self.depth = self.target = depth
        self.owner = SleepOwner.FLEET
        self.resident_bytes = resident_bytes
        self.measured: list[int | None] = [None] * len(Depth)
        self.measured[depth] = resident_bytes
        self.wake_s: list[float | None] = [None] * len(Depth)
        self.running = 0
        self.held: dict[str, Held] = {}
        self.waiting_since: float | None = None
        self.keep_alive_s: float | None = None
        self.lease_id: str | None = None
        self.asked_depth: Depth | None = None
        self.awake_since = now if depth is Depth.AWAKE else -math.inf
        self.no_sleep_until = -math.inf
        self.pinned = spec.pinned
        self.paused = self.refuses = self.weight_session = self.weights_updated = self.retiring = False
        self.frequency = 0.0
        self.counted_at = self.used_at = now
        self.charged_bytes = self.projected_bytes = self.floor_bytes = 0
        self.value = 0.0
        self.rank: tuple[float, str] | None = None

    # --- what it takes --------------------------------------------------------------------------

    def expected_bytes(self, depth: Depth) -> int:
        """What it takes at `depth`: measured there, else estimated, but no more than one depth above."""
        measured = self.measured[depth]
        if measured is not None:
            return measured
        estimate = self.spec.estimated_bytes(depth)
        return estimate if depth is Depth.AWAKE else min(estimate, self.expected_bytes(Depth(depth - 1)))

    @property
    def awake_bytes(self) -> int:
        """What is reserved for it awake: what it took after its last wake, and what it may grow by."""
        return self.expected_bytes(Depth.AWAKE) + self.spec.growth_bytes

    def bytes_at(self, depth: Depth) -> int:
        """What is counted for it at `depth`; where it is now, no less than it takes."""
        counted = self.awake_bytes if depth is Depth.AWAKE else self.expected_bytes(depth)
        if depth is self.depth and self.resident_bytes is not None:
            return max(counted, self.resident_bytes) if depth is Depth.AWAKE else self.resident_bytes
        return counted

    def charge(self) -> int:
        """What is counted for it now; of a transition the larger end."""
        return max(self.bytes_at(self.depth), self.bytes_at(self.target))

    def certain_bytes(self) -> int:
        """What it takes at least, without reserves: of a transition the smaller end."""
        now = self.expected_bytes(self.depth) if self.resident_bytes is None else self.resident_bytes
        return min(now, self.expected_bytes(self.target)) if self.phase.in_transition else now

    def floor(self) -> int:
        """What it takes at least as long as nobody but the fleet does anything about it."""
        by_operator = self.owner is SleepOwner.OPERATOR and self.phase is not Phase.AWAKE
        if by_operator or (self.is_protected and self.target is Depth.AWAKE):
            return self.bytes_at(self.target)
        return min(self.bytes_at(self.target), self.bytes_at(self.deepest))

    def freed_bytes(self, depth: Depth) -> int:
        """What a sleep to `depth` would give back."""
        return self.bytes_at(self.depth) - self.bytes_at(depth)

    # --- what may be done with it ---------------------------------------------------------------

    @property
    def is_protected(self) -> bool:
        """Pinned, paused, or being written into."""
        return self.pinned or self.paused or self.weight_session

    @property
    def is_idle(self) -> bool:
        """Nobody needs it: no request runs or waits, and no transition is under way."""
        return not self.running and not self.held and not self.phase.in_transition

    @property
    def is_evictable(self) -> bool:
        """It may be put to sleep, or to a deeper one, for others, once it has been awake long enough."""
        if not self.is_idle or self.is_protected or self.retiring:
            return False
        if self.phase is Phase.AWAKE:
            return True
        return self.owner is not SleepOwner.OPERATOR and self.freed_bytes(self.deepest) > 0

    @property
    def deepest(self) -> Depth:
        """How deep the fleet may put it to sleep: below level 1, weights that were written into it would be lost."""
        return max(Depth.LEVEL_1, self.depth) if self.weights_updated else Depth.UNLOADED

    def evictable_at(self, settings: FleetSettings) -> float:
        """From when on it may be evicted, if nothing else is against it."""
        min_awake_s = self.spec.min_awake_s
        least = settings.min_awake_s if min_awake_s is None else min_awake_s
        return max(self.awake_since + least, self.no_sleep_until) if self.phase is Phase.AWAKE else self.no_sleep_until

    def idle_s(self, settings: FleetSettings) -> float:
        """Seconds without a request after which it sleeps; negative for never."""
        if self.pinned:
            return -1.0
        if self.keep_alive_s is not None:
            return self.keep_alive_s
        return settings.sleep_idle_s if self.spec.sleep_idle_s is None else self.spec.sleep_idle_s

    # --- how much it is worth -------------------------------------------------------------------

    def wake_cost_s(self, depth: Depth) -> float:
        """How long a wake from `depth` takes: measured, else as from a shallower depth, else estimated."""
        for known in range(depth, Depth.AWAKE, -1):
            measured = self.wake_s[known]
            if measured is not None:
                return measured
        return self.spec.wake_s

    def frequency_at(self, now: float, half_life_s: float) -> float:
        """How many requests there were lately: each counts half as much after `half_life_s`."""
        return self.frequency * math.exp2((self.counted_at - now) / half_life_s)

    def count_request(self, now: float, half_life_s: float) -> None:
        """There was another one."""
        self.frequency = self.frequency_at(now, half_life_s) + 1.0
        self.counted_at = self.used_at = now

    # --- moves ----------------------------------------------------------------------------------

    def begin(self, move: Move, depth: Depth) -> None:
        """Start a transition to `depth`."""
        self.phase = after(self.phase, move, model=self.name)
        self.target = depth

    def arrive(self, resident_bytes: int, seconds: float, now: float) -> None:
        """End the transition under way: the model is where it led."""
        self.phase = after(self.phase, Move.FINISH, model=self.name)
        if self.phase is Phase.AWAKE:
            self.wake_s[self.depth] = seconds
            self.awake_since = now
        self.depth = self.target
        self.resident_bytes = self.measured[self.depth] = resident_bytes

    def go_back(self) -> None:
        """End the transition under way: the model is where it was."""
        self.phase = after(self.phase, Move.FAIL, model=self.name)
        self.target = self.depth

    def lose(self) -> None:
        """Its process is gone."""
        self.phase = after(self.phase, Move.LOSE, model=self.name)
        self.depth = self.target = Depth.UNLOADED
        self.resident_bytes = None
        self.owner = SleepOwner.FLEET
        self.weights_updated = self.weight_session = self.paused = self.refuses = False
        self.keep_alive_s = None
