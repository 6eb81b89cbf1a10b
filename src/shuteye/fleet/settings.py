"""How a fleet decides: the limits and times that hold for all models unless one has its own."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shuteye.errors import InvalidRequest
from shuteye.fleet.model_spec import NEVER, Depth


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSettings:
    """Limits and times; seconds unless said otherwise.

    Attributes:
        max_held: requests that may wait for a wake, of all models together.
        min_awake_s: after a wake a model is not evicted for so long.
        sleep_idle_s: without a request for so long a model sleeps; negative for never.
        sleep_idle_depth: how deep it then sleeps.
        sleep_escalate_s: after so long at one depth it sleeps more deeply; negative for never.
        evict_depth: how deep models sleep that make room for others; deeper if that frees too little.
        batch_factor: a rare model does not displace one that has woken less than so many times ago what that and its
            undoing take; meanwhile requests gather, and one wake serves them. 0 to swap at every request.
        batch_wait_s: but no request waits longer for that.
        batch_requests: nor do so many requests for one model.
        fairness_s: a model that has waited so long for room gets the next that is free, before any that needs less.
        retry_s: how long to leave a model awake whose sleep has failed.
        half_life_s: in which requests count half as much for a model's frequency.

    Raises:
        InvalidRequest: a field is out of its range.
    """

    max_held: int = 1024
    min_awake_s: float = 1.0
    sleep_idle_s: float = NEVER
    sleep_idle_depth: Depth = Depth.LEVEL_1
    sleep_escalate_s: float = NEVER
    evict_depth: Depth = Depth.LEVEL_1
    batch_wait_s: float = 30.0
    batch_factor: float = 12.0
    batch_requests: int = 16
    fairness_s: float = 5.0
    retry_s: float = 1.0
    half_life_s: float = 3600.0

    def __post_init__(self) -> None:
        for name in ("min_awake_s", "batch_wait_s", "batch_factor", "fairness_s", "retry_s"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "finite and at least 0")
        self._require("half_life_s", self.half_life_s > 0, "greater than 0")
        for name in ("max_held", "batch_requests"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("sleep_idle_depth", "evict_depth"):
            self._require(name, getattr(self, name) is not Depth.AWAKE, "a depth of sleep: 1, 2 or 3")
        for name in ("sleep_idle_s", "sleep_escalate_s"):
            self._require(name, not math.isnan(getattr(self, name)), "a number; negative for never")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise InvalidRequest(f"{name} must be {expected}, got {getattr(self, name)!r}.", param=name)
