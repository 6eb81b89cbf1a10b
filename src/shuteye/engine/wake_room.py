"""Whether a machine has room for what all of its ranks are about to bring back: each alone might fit. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from shuteye.errors import MemoryExhausted
from shuteye.state import WakeEstimate


def require_room(estimates: Iterable[tuple[str, WakeEstimate]]) -> None:
    """Refuse a wake for which a machine has no room.

    Args:
        estimates: of each rank, with the name of its machine.

    Raises:
        MemoryExhausted: says what the ranks of the machine need together, and what it has.
    """
    by_host: dict[str, list[WakeEstimate]] = {}
    for host, estimate in estimates:
        by_host.setdefault(host, []).append(estimate)
    for host, found in by_host.items():
        needed = sum(estimate.needed_bytes for estimate in found)
        available = min((estimate.available_bytes for estimate in found if estimate.needed_bytes), default=0)
        if needed > available:
            raise MemoryExhausted(
                f"Waking takes {needed:,} bytes of memory for the ranks on {host} together and {available:,} are "
                "available. Free memory and try again."
            )
