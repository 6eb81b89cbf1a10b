"""What the scheduler is told: requests, what transitions came to, what was measured, what operators and leases ask.

Times are seconds on one clock of the caller's that never goes back. When an event happened is told beside it
(`fleet/scheduler.py:Scheduler.handle`).
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from shuteye.fleet.model_spec import Depth, ModelSpec


class Event(msgspec.Struct, frozen=True):
    """Something that has happened."""


# --- models -------------------------------------------------------------------------------------


class ModelAdded(Event, frozen=True, tag=True):
    """There is one more model.

    Attributes:
        depth: where it is now.
        resident_bytes: what it takes there, if that was measured.

    Raises:
        InvalidRequest: there is one of that name.
    """

    spec: ModelSpec
    depth: Depth = Depth.UNLOADED
    resident_bytes: int | None = None


class ModelChanged(Event, frozen=True, tag=True):
    """A model has other settings from now on; what was measured of it stays.

    Raises:
        ModelNotFound: there is none of that name.
    """

    spec: ModelSpec


class ModelRemoved(Event, frozen=True, tag=True):
    """A model is to go: what waits for it is refused, what runs may finish, then it is unloaded and forgotten."""

    model: str


class ModelLost(Event, frozen=True, tag=True):
    """A model's process has ended by itself. The next request starts it again; what ran is told as finished."""

    model: str


# --- requests -----------------------------------------------------------------------------------


class RequestArrived(Event, frozen=True, tag=True):
    """A request that needs a model. Answered once, by its deadline at the latest: `Admit` or `Refuse`.

    Attributes:
        request_id: not that of another request under way.
        deadline: when it is refused if it could not be admitted.
        keep_alive_s: how long the model stays awake without a request from now on: 0 not at all, negative for ever,
            None as before. Ollama's `keep_alive` and LM Studio's `ttl`; holds until the model sleeps.
    """

    model: str
    request_id: str
    deadline: float
    keep_alive_s: float | None = None


class RequestFinished(Event, frozen=True, tag=True):
    """A request has ended: its last byte was sent, or its client went, also while it was held.

    Raises:
        InternalError: no such request is running or held.
    """

    request_id: str


class KeepAliveChanged(Event, frozen=True, tag=True):
    """How long a model stays awake without a request, as `RequestArrived` has it; 0 puts an idle one to sleep."""

    model: str
    keep_alive_s: float


# --- transitions --------------------------------------------------------------------------------


class TransitionFinished(Event, frozen=True, tag=True):
    """The wake or sleep that was asked for is done.

    Attributes:
        resident_bytes: what the model takes now, as measured.
        seconds: how long it took.

    Raises:
        InternalError: none is under way.
    """

    model: str
    resident_bytes: int
    seconds: float


class TransitionFailed(Event, frozen=True, tag=True):
    """The wake or sleep that was asked for was rolled back: the model is where it was.

    Raises:
        InternalError: none is under way.
    """

    model: str
    error: str = ""


# --- measurements -------------------------------------------------------------------------------


class ResidentMeasured(Event, frozen=True, tag=True):
    """What a model takes, measured again; ignored during a transition, which reserves its larger end."""

    model: str
    resident_bytes: int


class BudgetChanged(Event, frozen=True, tag=True):
    """Other bytes for all models and leases together: the operator's, or what pressure from outside leaves."""

    budget_bytes: int


class AvailableMeasured(Event, frozen=True, tag=True):
    """What the machine, or its control group, could still give; None if nobody knows, which limits nothing.

    To be told after `ResidentMeasured` and `LeaseUsed` of the same moment: what models and leases take already
    comes on top of it.
    """

    available_bytes: int | None


# --- operators ----------------------------------------------------------------------------------


class SleepAsked(Event, frozen=True, tag=True):
    """An operator puts a model to sleep, busy or not: what becomes of its requests is the call's mode.

    Raises:
        TransitionConflict: it sleeps more deeply than that.
    """

    model: str
    depth: Depth = Depth.LEVEL_1


class WakeAsked(Event, frozen=True, tag=True):
    """An operator wakes a model, whoever put it to sleep. Answered as a request, which is over once admitted."""

    model: str
    request_id: str
    deadline: float


class PinChanged(Event, frozen=True, tag=True):
    """A model is never to be evicted, or may be again."""

    model: str
    pinned: bool


class PauseChanged(Event, frozen=True, tag=True):
    """A pause has begun or ended; while it lasts the model is neither evicted nor put to sleep.

    Attributes:
        refuses: new requests are refused (modes `abort` and `wait`), not queued (`keep`).
    """

    model: str
    paused: bool
    refuses: bool = False


class WeightSessionChanged(Event, frozen=True, tag=True):
    """Somebody has begun, or ended, to write weights into a model: it is not put to sleep meanwhile."""

    model: str
    held: bool


class WeightsUpdated(Event, frozen=True, tag=True):
    """A model's weights are no longer its image's, or are again: below level 1 they would be lost.

    So the fleet puts it to no deeper sleep by itself.
    """

    model: str
    updated: bool


# --- leases -------------------------------------------------------------------------------------


class LeaseClaimed(Event, frozen=True, tag=True):
    """Somebody else needs memory. Answered once: `GrantLease`, or `RefuseLease` within `within_s`.

    Attributes:
        within_s: how long there is to free it; after that everything is undone.
        ttl_s: how long it is lent, from the grant on, unless it is renewed.
        priority: models of higher priority are not put to sleep for it.
        may_sleep: the models that may be; None for all, which still leaves active, pinned and paused ones alone.
        restore: models that were put to sleep for it are woken at its end, where there is room.
        dry_run: only say what would be done.

    Raises:
        InvalidRequest: a value is out of range, or the id is in use.
    """

    lease_id: str
    nbytes: int
    within_s: float
    ttl_s: float
    holder: str = ""
    priority: int = 0
    may_sleep: tuple[str, ...] | None = None
    restore: bool = True
    dry_run: bool = False


class LeaseRenewed(Event, frozen=True, tag=True):
    """A lease is to last `ttl_s` from now on.

    Raises:
        LeaseGone: it has expired, was released or never granted; a lease that is over stays over.
    """

    lease_id: str
    ttl_s: float


class LeaseReleased(Event, frozen=True, tag=True):
    """Its holder has no more use for it, or is gone. A claim that is not granted yet is withdrawn.

    Raises:
        LeaseGone: there is none of that id.
    """

    lease_id: str


class LeaseUsed(Event, frozen=True, tag=True):
    """How much of a lease its holder takes already, as measured: not counted again as missing from the machine."""

    lease_id: str
    used_bytes: int


# --- time ---------------------------------------------------------------------------------------


class Tick(Event, frozen=True, tag=True):
    """Time has passed; wanted at `Scheduler.next_tick_at`."""


ModelEvent: TypeAlias = ModelAdded | ModelChanged | ModelRemoved | ModelLost
RequestEvent: TypeAlias = RequestArrived | RequestFinished | KeepAliveChanged
TransitionEvent: TypeAlias = TransitionFinished | TransitionFailed
MeasuredEvent: TypeAlias = ResidentMeasured | BudgetChanged | AvailableMeasured
OperatorEvent: TypeAlias = SleepAsked | WakeAsked | PinChanged | PauseChanged | WeightSessionChanged | WeightsUpdated
LeaseEvent: TypeAlias = LeaseClaimed | LeaseRenewed | LeaseReleased | LeaseUsed
AnyEvent: TypeAlias = ModelEvent | RequestEvent | TransitionEvent | MeasuredEvent | OperatorEvent | LeaseEvent | Tick
