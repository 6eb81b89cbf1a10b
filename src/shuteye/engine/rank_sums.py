"""What all ranks together say of a tag: bytes are added up.

Knows nothing of transitions.
"""

from __future__ import annotations

from dataclasses import replace

from shuteye.outputs import TagReport, TagState


def sum_states(ranks: tuple[TagState, ...]) -> TagState:
    """Of one tag on every rank."""
    return replace(
        ranks[0],
        nbytes=sum(state.nbytes for state in ranks),
        resident_bytes=sum(state.resident_bytes for state in ranks),
    )


def sum_reports(ranks: tuple[TagReport, ...]) -> TagReport:
    """Of one tag on every rank; they work at once, so the slowest one's time counts."""
    return replace(
        ranks[0],
        freed_bytes=sum(report.freed_bytes for report in ranks),
        restored_bytes=sum(report.restored_bytes for report in ranks),
        saved_bytes=sum(report.saved_bytes for report in ranks),
        seconds=max(report.seconds for report in ranks),
    )
