"""What the scheduler wants done: wakes, sleeps, answers to requests and to claims of leases. Frozen plans.

They are carried out elsewhere: whoever carries out a `Wake` or a `Sleep` answers with one `TransitionFinished` or
`TransitionFailed`.
"""

from __future__ import annotations

from enum import Enum
from typing import TypeAlias

import msgspec

from shuteye.fleet.model_spec import Depth, SleepOwner


class Action(msgspec.Struct, frozen=True):
    """Something to be done."""


class Wake(Action, frozen=True, tag=True):
    """Wake a model, which is at `depth`; room for it has been reserved."""

    model: str
    depth: Depth


class Sleep(Action, frozen=True, tag=True):
    """Put a model to sleep, or from one depth to a deeper one."""

    model: str
    depth: Depth
    owner: SleepOwner


class Admit(Action, frozen=True, tag=True):
    """Let a request run; its model is awake, and stays so until the request is told as finished."""

    request_id: str
    model: str
    waited_s: float


class Refusal(Enum):
    """Why a request is refused."""

    DEADLINE = "deadline"
    QUEUE_FULL = "queue_full"
    NO_ROOM = "no_room"
    SLEEPING = "sleeping"
    LEASED = "leased"
    PAUSED = "paused"
    WAKE_FAILED = "wake_failed"
    REMOVED = "removed"


class Refuse(Action, frozen=True, tag=True):
    """Answer 503; the model stays as it is.

    Attributes:
        retry_after_s: when to ask again; None if only an operator can help.
        detail: what was seen and what stands in the way, in a sentence.
    """

    request_id: str
    model: str
    why: Refusal
    retry_after_s: float | None
    detail: str


class Obstacle(msgspec.Struct, frozen=True):
    """What keeps memory from being freed.

    Attributes:
        name: a model, or the holder of another lease.
        why: `active`, `pinned`, `paused`, `weight session`, `in transition`, `awake too short`, `priority`,
            `not allowed`, or `lease`.
        nbytes: what would be free without it.
    """

    name: str
    why: str
    nbytes: int


class GrantLease(Action, frozen=True, tag=True):
    """The bytes are free, and are kept free until `expires_at`.

    Attributes:
        slept: the models that were put to sleep for it; of a dry run, those that would be.
        freed_bytes: what that gave back by measurement; of a dry run, what it should.
        restore_s: what waking them again takes, by what was measured last.
    """

    lease_id: str
    nbytes: int
    expires_at: float
    slept: tuple[str, ...]
    freed_bytes: int
    restore_s: float
    dry_run: bool = False


class RefuseLease(Action, frozen=True, tag=True):
    """The bytes cannot be had, or were not within the time; what was put to sleep for them is woken again.

    Attributes:
        available_bytes: the most that could be had now.
        in_the_way: what the rest of the budget is taken by; largest first.
        timed_out: `within_s` has passed; else there was no way.
    """

    lease_id: str
    available_bytes: int
    in_the_way: tuple[Obstacle, ...]
    timed_out: bool
    dry_run: bool = False


class EndLease(Action, frozen=True, tag=True):
    """A lease is over.

    Attributes:
        expired: it was neither renewed nor released in time.
        restoring: models that are woken again, as room allows.
    """

    lease_id: str
    expired: bool
    restoring: tuple[str, ...] = ()


AnyAction: TypeAlias = Wake | Sleep | Admit | Refuse | GrantLease | RefuseLease | EndLease
