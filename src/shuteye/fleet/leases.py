"""Leases: bytes of the budget that somebody else may use for a while, and the models that sleep for that.

A claim takes its place at once, so that neither requests nor other claims get what is freed for it; it holds the bytes
from its grant on. What is over stays over: renewing never brings a lease back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from shuteye.errors import InvalidRequest, LeaseGone
from shuteye.fleet.actions import EndLease, GrantLease, Obstacle, RefuseLease
from shuteye.fleet.entry import ModelEntry
from shuteye.fleet.events import LeaseClaimed
from shuteye.fleet.fleet_state import FleetState
from shuteye.fleet.model_spec import SleepOwner
from shuteye.fleet.phases import Phase
from shuteye.fleet.ranking import Victim
from shuteye.fleet.requests import Requests
from shuteye.fleet.status import LeaseStatus
from shuteye.fleet.timers import Due
from shuteye.fleet.waking import Waking


@dataclass(slots=True)
class Lease:
    """A claim, and what has come of it.

    Attributes:
        slept: models that were put to sleep for it and have not been woken by others since.
        freed_bytes: what their sleeps gave back, as measured.
        used_bytes: what its holder takes already; None if nobody has measured it.
        expires_at: when it ends; None until it is granted.
    """

    claim: LeaseClaimed
    slept: dict[str, ModelEntry] = field(default_factory=dict)
    freed_bytes: int = 0
    used_bytes: int | None = None
    expires_at: float | None = None

    @property
    def is_granted(self) -> bool:
        """Whether its bytes are held, and no longer waited for."""
        return self.expires_at is not None

    def status(self) -> LeaseStatus:
        """What is told of it."""
        claim = self.claim
        return LeaseStatus(
            lease_id=claim.lease_id,
            holder=claim.holder,
            nbytes=claim.nbytes,
            used_bytes=self.used_bytes,
            slept=tuple(self.slept),
            expires_at=self.expires_at,
        )


class Leases:
    """All leases and claims, by id."""

    def __init__(self, fleet: FleetState, requests: Requests, waking: Waking) -> None:
        self._fleet = fleet
        self._requests = requests
        self._waking = waking
        self._leases: dict[str, Lease] = {}

    def __iter__(self) -> Iterator[Lease]:
        return iter(self._leases.values())

    @property
    def any_claimed(self) -> bool:
        """Whether a claim waits for its bytes."""
        return self._fleet.room.claimed_bytes > 0

    @property
    def used_bytes(self) -> int:
        """What holders take of what they were granted, as far as that was measured."""
        used = ((lease.used_bytes or 0, lease.claim.nbytes) for lease in self if lease.is_granted)
        return sum(min(pair) for pair in used)

    # --- claims ---------------------------------------------------------------------------------

    def claim(self, claim: LeaseClaimed) -> None:
        """Take a claim, or refuse it if nothing that time could bring would do.

        Raises:
            InvalidRequest: a value is out of range, or the id is in use.
        """
        self._check(claim)
        if claim.dry_run:
            self._try(claim)
            return
        if self._could_get(claim) < claim.nbytes:
            self._fleet.actions.append(self._refusal(claim, timed_out=False))
            return
        self._leases[claim.lease_id] = Lease(claim)
        self._fleet.room.claimed_bytes += claim.nbytes
        self._fleet.timers.set((Due.CLAIM_OVER, claim.lease_id), self._fleet.now + claim.within_s)
        self._fleet.changed = True

    def _check(self, claim: LeaseClaimed) -> None:
        if claim.lease_id in self._leases:
            raise InvalidRequest(f"There is a lease {claim.lease_id!r}.", param="lease_id")
        if claim.nbytes <= 0:
            raise InvalidRequest(f"bytes of a lease must be at least 1, got {claim.nbytes}.", param="bytes")
        if not 0 <= claim.within_s < math.inf:
            raise InvalidRequest(f"within_s must be finite and at least 0, got {claim.within_s}.", param="within_s")
        _check_ttl(claim.ttl_s)
        for model in claim.may_sleep or ():
            self._fleet.entry(model)

    def _try(self, claim: LeaseClaimed) -> None:
        """Say what a claim would come to."""
        fleet = self._fleet
        missing = claim.nbytes - min(fleet.room.free_bytes, fleet.room.projected_free_bytes) + fleet.room.claimed_bytes
        victims = self._victims(claim, missing) if missing > 0 else ()
        if missing > 0 and not victims:
            fleet.actions.append(self._refusal(claim, timed_out=False))
            return
        awake = [victim for victim in victims if victim.entry.phase is Phase.AWAKE]
        fleet.actions.append(
            GrantLease(
                claim.lease_id,
                claim.nbytes,
                expires_at=fleet.now + claim.ttl_s,
                slept=tuple(victim.entry.name for victim in awake),
                freed_bytes=sum(victim.freed_bytes for victim in victims),
                restore_s=sum(victim.entry.wake_cost_s(victim.depth) for victim in awake),
                dry_run=True,
            )
        )

    # --- freeing --------------------------------------------------------------------------------

    def free(self) -> None:
        """Grant the claims whose bytes are free, and put models to sleep for the others.

        Those that models sleep for already come first, so that nobody gets what was freed for them; then by priority.
        """
        room = self._fleet.room
        free, projected = room.free_bytes, room.projected_free_bytes
        for lease in self._claims():
            need = lease.claim.nbytes
            if need > projected:
                projected += self._sleep_for(lease, need - projected)
            if need <= min(free, projected):
                self._grant(lease)
            projected -= need
            free -= need

    def _claims(self) -> list[Lease]:
        pending = (lease for lease in self if not lease.is_granted)
        return sorted(pending, key=lambda lease: (not lease.slept, -lease.claim.priority))

    def _sleep_for(self, lease: Lease, nbytes: int) -> int:
        victims = self._victims(lease.claim, nbytes)
        for victim in victims:
            if victim.entry.phase is Phase.AWAKE:  # of those who sleep already some memory more, but no wake later on
                lease.slept[victim.entry.name] = victim.entry
            victim.entry.lease_id = lease.claim.lease_id
        return self._fleet.evict(victims, SleepOwner.LEASE)

    def _victims(self, claim: LeaseClaimed, nbytes: int) -> tuple[Victim, ...]:
        return self._fleet.ranking.choose(nbytes, self._fleet.now, lambda entry: self._objection(claim, entry) is None)

    def _grant(self, lease: Lease) -> None:
        fleet, claim = self._fleet, lease.claim
        fleet.room.claimed_bytes -= claim.nbytes
        fleet.room.leased_bytes += claim.nbytes
        lease.expires_at = fleet.now + claim.ttl_s
        fleet.timers.cancel((Due.CLAIM_OVER, claim.lease_id))
        self._time(lease)
        restore_s = sum(entry.wake_cost_s(entry.depth) for entry in lease.slept.values())
        slept, freed = tuple(lease.slept), lease.freed_bytes
        fleet.actions.append(GrantLease(claim.lease_id, claim.nbytes, lease.expires_at, slept, freed, restore_s))

    def _time(self, lease: Lease) -> None:
        """`lease` ends when it says it does."""
        assert lease.expires_at is not None
        self._fleet.timers.set((Due.LEASE_OVER, lease.claim.lease_id), lease.expires_at)
        self._note_next_end()

    def _note_next_end(self) -> None:
        ends = (lease.expires_at for lease in self if lease.expires_at is not None)
        self._fleet.next_lease_end = min(ends, default=None)

    # --- what is in the way ---------------------------------------------------------------------

    def _objection(self, claim: LeaseClaimed, entry: ModelEntry) -> str | None:
        """Why a model is not put to sleep for a claim now; None if it may be."""
        lasting = self._lasting_objection(claim, entry)
        if lasting is not None:
            return lasting
        if entry.phase.in_transition:
            return "in transition"
        if not entry.is_idle:
            return "active"
        at = entry.evictable_at(self._fleet.settings)
        if at > self._fleet.now:
            self._fleet.recheck_at(at)
            return "awake too short"
        return None

    @staticmethod
    def _lasting_objection(claim: LeaseClaimed, entry: ModelEntry) -> str | None:
        """Why a model is not put to sleep for a claim, however long one waits."""
        if claim.may_sleep is not None and entry.name not in claim.may_sleep:
            return "not allowed"
        if entry.spec.priority > claim.priority:
            return "priority"
        if entry.pinned:
            return "pinned"
        if entry.paused:
            return "paused"
        return "weight session" if entry.weight_session else None

    def _could_get(self, claim: LeaseClaimed) -> int:
        """The most that could be had if everybody who may sleep had nothing to do."""
        kept = sum(
            entry.bytes_at(entry.target) if self._lasting_objection(claim, entry) else self._least(entry)
            for entry in self._fleet.entries.values()
        )
        room = self._fleet.room
        return room.budget_bytes - room.leased_bytes - room.claimed_bytes - kept

    @staticmethod
    def _least(entry: ModelEntry) -> int:
        """What is left of a model once it sleeps as deeply as it may for a lease."""
        if entry.target is not entry.depth or entry.phase is Phase.AWAKE or entry.is_evictable:
            return min(entry.bytes_at(entry.target), entry.expected_bytes(entry.deepest))
        return entry.bytes_at(entry.depth)

    def _refusal(self, claim: LeaseClaimed, *, timed_out: bool) -> RefuseLease:
        """What could be had now, and what stands in the way."""
        obstacles = [*self._busy(claim), *self._other_leases(claim)]
        obstacles.sort(key=lambda obstacle: -obstacle.nbytes)
        could_sleep = sum(
            max(0, entry.projected_bytes - self._least(entry))
            for entry in self._fleet.entries.values()
            if self._objection(claim, entry) is None
        )
        room = self._fleet.room
        others = room.claimed_bytes - (claim.nbytes if claim.lease_id in self._leases else 0)
        available = max(0, room.projected_free_bytes - others + could_sleep)
        return RefuseLease(claim.lease_id, available, tuple(obstacles), timed_out, claim.dry_run)

    def _busy(self, claim: LeaseClaimed) -> Iterator[Obstacle]:
        for entry in self._fleet.entries.values():
            why = self._objection(claim, entry)
            nbytes = entry.projected_bytes - entry.expected_bytes(entry.deepest)
            if why is not None and nbytes > 0:
                yield Obstacle(entry.name, why, nbytes)

    def _other_leases(self, claim: LeaseClaimed) -> Iterator[Obstacle]:
        for lease in self:
            if lease.claim.lease_id != claim.lease_id:
                yield Obstacle(lease.claim.holder or lease.claim.lease_id, "lease", lease.claim.nbytes)

    # --- what happens to models meanwhile -------------------------------------------------------

    def note_sleep(self, entry: ModelEntry, freed_bytes: int) -> None:
        """A model that was put to sleep for a lease has done so."""
        lease = self._leases.get(entry.lease_id or "")
        if lease is not None and not lease.is_granted:
            lease.freed_bytes += max(0, freed_bytes)
        if lease is None or entry.name not in lease.slept:
            entry.lease_id = None

    def let_go(self, entry: ModelEntry) -> None:
        """A model no longer sleeps for its lease: it failed to, was woken, is gone, or is now an operator's."""
        lease = self._leases.get(entry.lease_id or "")
        entry.lease_id = None
        if lease is not None:
            lease.slept.pop(entry.name, None)

    # --- renewals and ends ----------------------------------------------------------------------

    def renew(self, lease_id: str, ttl_s: float) -> None:
        """Have a lease end `ttl_s` from now.

        Raises:
            LeaseGone: there is none any more, or not yet.
            InvalidRequest: `ttl_s` is out of range.
        """
        lease = self._lease(lease_id)
        if not lease.is_granted:
            raise LeaseGone(f"The lease {lease_id!r} is not granted yet.", param="lease_id")
        _check_ttl(ttl_s)
        lease.expires_at = self._fleet.now + ttl_s
        self._time(lease)

    def use(self, lease_id: str, used_bytes: int) -> None:
        """How much of a lease its holder takes.

        Raises:
            LeaseGone: there is none any more.
        """
        self._lease(lease_id).used_bytes = max(0, used_bytes)

    def end(self, lease_id: str, *, expired: bool = False) -> None:
        """End a lease, or withdraw a claim, and wake what sleeps for it if that is wanted.

        Raises:
            LeaseGone: there is none any more.
        """
        lease = self._lease(lease_id)
        restore = lease.claim.restore or not lease.is_granted
        restoring = self._remove(lease, restore=restore)
        self._fleet.actions.append(EndLease(lease_id, expired, restoring))

    def expire(self) -> None:
        """End what has ended by now, before anything else is looked at: late is not in time."""
        now = self._fleet.now
        if self._fleet.next_lease_end is None or self._fleet.next_lease_end > now:
            return
        over = [one.claim.lease_id for one in self if one.expires_at is not None and one.expires_at <= now]
        for lease_id in over:
            self.end(lease_id, expired=True)

    def give_up(self, lease_id: str) -> None:
        """The time of a claim is over: refuse it, and undo what was done for it."""
        lease = self._lease(lease_id)
        self._fleet.actions.append(self._refusal(lease.claim, timed_out=True))
        self._remove(lease, restore=True)

    def _remove(self, lease: Lease, *, restore: bool) -> tuple[str, ...]:
        fleet, claim = self._fleet, lease.claim
        del self._leases[claim.lease_id]
        if lease.is_granted:
            fleet.room.leased_bytes -= claim.nbytes
        else:
            fleet.room.claimed_bytes -= claim.nbytes
        fleet.timers.cancel((Due.LEASE_OVER, claim.lease_id))
        fleet.timers.cancel((Due.CLAIM_OVER, claim.lease_id))
        self._note_next_end()
        for entry in lease.slept.values():
            entry.lease_id, entry.owner = None, SleepOwner.FLEET
            if restore:
                self._waking.wish(entry)
            self._requests.review(entry)
        fleet.changed = True
        return tuple(lease.slept) if restore else ()

    def _lease(self, lease_id: str) -> Lease:
        lease = self._leases.get(lease_id)
        if lease is None:
            raise LeaseGone(f"There is no lease {lease_id!r} any more. Claim the memory again.", param="lease_id")
        return lease


def _check_ttl(ttl_s: float) -> None:
    if not 0 < ttl_s < math.inf:
        raise InvalidRequest(f"ttl_s must be finite and greater than 0, got {ttl_s}.", param="ttl_s")
