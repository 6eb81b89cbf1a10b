"""What the scheduler tells of models and leases to whoever shows them. Plain frozen data."""

from __future__ import annotations

import msgspec

from shuteye.fleet.entry import ModelEntry
from shuteye.fleet.model_spec import Depth, SleepOwner
from shuteye.fleet.phases import Phase
from shuteye.fleet.timers import Due, Timers


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One model, now.

    Attributes:
        depth: where it is; during a transition where that began.
        owner: on whose behalf it sleeps or falls asleep; None while it is awake or wakes.
        resident_bytes: as measured; None if it never was.
        charged_bytes: what is counted for it against the budget.
        idle_at: when it falls asleep if no request comes; None if it does not.
        wake_s: how long a wake from where it is should take.
    """

    model: str
    phase: Phase
    depth: Depth
    owner: SleepOwner | None
    resident_bytes: int | None
    charged_bytes: int
    running: int
    held: int
    pinned: bool
    paused: bool
    idle_at: float | None
    wake_s: float


class LeaseStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One lease or claim, now.

    Attributes:
        expires_at: when it ends; None for a claim that waits for its bytes.
    """

    lease_id: str
    holder: str
    nbytes: int
    used_bytes: int | None
    slept: tuple[str, ...]
    expires_at: float | None


class RoomStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The budget, now; bytes."""

    budget_bytes: int
    charged_bytes: int
    leased_bytes: int
    claimed_bytes: int
    held_requests: int


def status_of(entry: ModelEntry, timers: Timers) -> ModelStatus:
    """What is told of a model."""
    sleeps = entry.target is not Depth.AWAKE
    return ModelStatus(
        model=entry.name,
        phase=entry.phase,
        depth=entry.depth,
        owner=entry.owner if sleeps else None,
        resident_bytes=entry.resident_bytes,
        charged_bytes=entry.charged_bytes,
        running=entry.running,
        held=len(entry.held),
        pinned=entry.pinned,
        paused=entry.paused,
        idle_at=timers.at((Due.IDLE, entry.name)),
        wake_s=entry.wake_cost_s(entry.depth),
    )
