"""How the models of one server share its memory: the budget, and when each of them sleeps by itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from shuteye.errors import InvalidRequest
from shuteye.fleet.model_spec import Depth
from shuteye.fleet.settings import FleetSettings
from shuteye.typed_fields import settle_types

IdleLevel = Literal["1", "2", "unloaded"]
_DEPTHS = {"1": Depth.LEVEL_1, "2": Depth.LEVEL_2, "unloaded": Depth.UNLOADED}


@dataclass(frozen=True, slots=True)
class FleetConfig:
    """What holds for all models of a server.

    Attributes:
        memory_budget: bytes that all of them may take together; None: what the machine and the control group leave.
        min_awake_seconds: for so long after a wake a model is not put to sleep for another one.
        sleep_idle_seconds: without a request for so long a model sleeps; None: it does not for that reason.
        sleep_idle_level: how deep.
        sleep_escalate_seconds: after so long at one depth it sleeps more deeply, and at last has no process.

    Raises:
        InvalidRequest: a value is of another type or out of range; `param` names it.
    """

    memory_budget: int | None = None
    min_awake_seconds: float = 1.0
    sleep_idle_seconds: float | None = None
    sleep_idle_level: IdleLevel = "1"
    sleep_escalate_seconds: float | None = None

    def __post_init__(self) -> None:
        settle_types(self)
        for name in ("memory_budget", "sleep_idle_seconds", "sleep_escalate_seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InvalidRequest(f"{name} must be a positive number, got {value}.", param=name)
        if not 0 <= self.min_awake_seconds < math.inf:
            raise InvalidRequest(
                f"min_awake_seconds must be 0 or more, got {self.min_awake_seconds}.", param="min_awake_seconds"
            )

    @property
    def is_asked_for(self) -> bool:
        """Whether it says anything that matters to a single model."""
        return self != FleetConfig()

    def settings(self) -> FleetSettings:
        """The same for the scheduler."""
        never = -1.0
        return FleetSettings(
            min_awake_s=self.min_awake_seconds,
            sleep_idle_s=never if self.sleep_idle_seconds is None else self.sleep_idle_seconds,
            sleep_idle_depth=_DEPTHS[self.sleep_idle_level],
            sleep_escalate_s=never if self.sleep_escalate_seconds is None else self.sleep_escalate_seconds,
        )
