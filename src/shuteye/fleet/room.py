"""Bytes: what the budget is, what is counted against it, and what is left. Sums that are kept, not computed again.

Counted are models, each at the larger end of a transition under way, with what is reserved for their growth; and leases
from their grant on. What is free may be used at once; what is projected is free once all sleeps under way are done.
"""

from __future__ import annotations

from shuteye.fleet.entry import ModelEntry


class Room:
    """The budget and the sums over all models and leases.

    Attributes:
        charged_bytes: what is counted for models now.
        projected_bytes: what will be, once the transitions under way are done.
        floor_bytes: what models take at least while nobody unpins or resumes any.
        leased_bytes: what granted leases hold.
        claimed_bytes: what claims wait for.
    """

    __slots__ = (
        "_available_cap",
        "_budget",
        "charged_bytes",
        "claimed_bytes",
        "floor_bytes",
        "leased_bytes",
        "projected_bytes",
    )

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        self._available_cap: int | None = None
        self.charged_bytes = self.projected_bytes = self.floor_bytes = 0
        self.leased_bytes = self.claimed_bytes = 0

    def count(self, entry: ModelEntry) -> bool:
        """Bring the sums in step with `entry`; True if there is more room than before."""
        charged, projected, floor = entry.charge(), entry.bytes_at(entry.target), entry.floor()
        gained = charged < entry.charged_bytes or projected < entry.projected_bytes or floor < entry.floor_bytes
        self._replace(entry, charged, projected, floor)
        return gained

    def forget(self, entry: ModelEntry) -> None:
        """Count `entry` no longer."""
        self._replace(entry, 0, 0, 0)

    def _replace(self, entry: ModelEntry, charged: int, projected: int, floor: int) -> None:
        self.charged_bytes += charged - entry.charged_bytes
        self.projected_bytes += projected - entry.projected_bytes
        self.floor_bytes += floor - entry.floor_bytes
        entry.charged_bytes, entry.projected_bytes, entry.floor_bytes = charged, projected, floor

    @property
    def budget_bytes(self) -> int:
        """What models and leases may take together: the operator's limit, or less if the machine has less."""
        return self._budget if self._available_cap is None else min(self._budget, self._available_cap)

    def set_budget(self, budget_bytes: int) -> None:
        """Have another limit."""
        self._budget = budget_bytes

    def set_available(self, available_bytes: int | None, taken_bytes: int) -> None:
        """Have the limit that the machine sets: what it could still give, on top of what is taken already.

        Args:
            available_bytes: None lifts it: what nobody knows is not nothing.
            taken_bytes: what models and holders of leases take already, and the machine therefore lacks.
        """
        self._available_cap = None if available_bytes is None else available_bytes + taken_bytes

    @property
    def free_bytes(self) -> int:
        """What may be taken now; negative if the budget has shrunk below what is counted."""
        return self.budget_bytes - self.charged_bytes - self.leased_bytes

    @property
    def projected_free_bytes(self) -> int:
        """What will be free once the sleeps under way are done; wakes under way have their memory already."""
        return self.budget_bytes - self.projected_bytes - self.leased_bytes

    def could_ever_fit(self, entry: ModelEntry, *, without_leases: bool = False) -> bool:
        """Whether `entry` fits awake, if all sleep that may be put to sleep."""
        leased = 0 if without_leases else self.leased_bytes + self.claimed_bytes
        return self.floor_bytes - entry.floor_bytes + entry.awake_bytes + leased <= self.budget_bytes
