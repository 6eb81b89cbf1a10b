"""A model as the fleet knows it before it has run: what it should take at each depth of sleep, and its settings.

What is measured later replaces the estimates (`fleet/entry.py`).
"""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import Literal, get_args

import msgspec

from shuteye.errors import InvalidRequest


class Depth(IntEnum):
    """How deep a model sleeps; the deeper, the less stays in memory and the longer a wake takes.

    `LEVEL_1` and `LEVEL_2` are `/sleep?level=`'s. `UNLOADED` has no process: only the image on disk is left.
    """

    AWAKE = 0
    LEVEL_1 = 1
    LEVEL_2 = 2
    UNLOADED = 3


class SleepOwner(Enum):
    """On whose behalf a model sleeps; what requests for it do depends on this."""

    IDLE = "idle"
    FLEET = "fleet"
    LEASE = "lease"
    OPERATOR = "operator"


SleepingPolicy = Literal["reject", "hold", "wake"]
"""What becomes of requests for a model that an operator or a lease has put to sleep."""

NEVER = -1.0
"""Seconds after which nothing happens: any negative number, as in Ollama's `keep_alive`."""


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One model of a fleet.

    Attributes:
        awake_bytes: what it should take right after a wake, with its KV cache empty; used until it was measured.
        growth_bytes: by how much that may grow while it serves, as its KV cache fills; reserved as long as it is awake.
        level_1_bytes: what should stay at level 1; as much as awake if None: what is not known is not free.
        level_2_bytes: the same at level 2; as much as at level 1 if None.
        unloaded_bytes: what stays once its process has ended.
        wake_s: how long a wake should take, from any depth that none was measured from.
        priority: a request never evicts a model of higher priority than its own.
        pinned: is never evicted, and does not fall asleep for want of requests.
        prewarm: is woken without a request where there is room; nothing is evicted for that.
        sleep_idle_s: seconds without a request after which it sleeps; negative for never. The fleet's if None, as are
            the next three.
        sleep_idle_depth: how deep.
        sleep_escalate_s: seconds at one depth after which it sleeps more deeply; negative for never.
        min_awake_s: seconds after a wake in which it is not evicted.
        on_sleeping_request: see `fleet/wake_rules.py`.

    Raises:
        InvalidRequest: a field is out of its range.
    """

    name: str
    awake_bytes: int
    growth_bytes: int = 0
    level_1_bytes: int | None = None
    level_2_bytes: int | None = None
    unloaded_bytes: int = 0
    wake_s: float = 1.0
    priority: int = 0
    pinned: bool = False
    prewarm: bool = False
    sleep_idle_s: float | None = None
    sleep_idle_depth: Depth | None = None
    sleep_escalate_s: float | None = None
    min_awake_s: float | None = None
    on_sleeping_request: SleepingPolicy | None = None

    def __post_init__(self) -> None:
        _require(bool(self.name), "name", self.name, "not empty")
        _require(self.awake_bytes > 0, "awake_bytes", self.awake_bytes, "at least 1: unknown is not nothing")
        for name in ("growth_bytes", "level_1_bytes", "level_2_bytes", "unloaded_bytes", "wake_s", "min_awake_s"):
            value = getattr(self, name)
            _require(value is None or 0 <= value < float("inf"), name, value, "finite and at least 0")
        _require(self.sleep_idle_depth is not Depth.AWAKE, "sleep_idle_depth", 0, "a depth of sleep: 1, 2 or 3")
        known = (None, *get_args(SleepingPolicy))
        _require(self.on_sleeping_request in known, "on_sleeping_request", self.on_sleeping_request, f"one of {known}")

    def estimated_bytes(self, depth: Depth) -> int:
        """What it should take at `depth`, without what is reserved for growth; never less than is known."""
        level_1 = self.awake_bytes if self.level_1_bytes is None else self.level_1_bytes
        level_2 = level_1 if self.level_2_bytes is None else self.level_2_bytes
        return (self.awake_bytes, level_1, level_2, self.unloaded_bytes)[depth]


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise InvalidRequest(f"{name} of a model must be {expected}, got {value!r}.", param=name)
