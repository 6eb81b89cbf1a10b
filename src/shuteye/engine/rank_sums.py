"""What every rank says of one tag, as what all of them say together.

Knows nothing of how they are asked.
"""

from __future__ import annotations

from dataclasses import replace

from shuteye.outputs import TagReport, TagState


def sum_states(ranks: tuple[TagState, ...]) -> TagState:
    """Where a tag is, with the bytes of all ranks."""
    return replace(
        ranks[0],
        nbytes=sum(state.nbytes for state in ranks),
        resident_bytes=sum(state.resident_bytes for state in ranks),
    )


def sum_reports(ranks: tuple[TagReport, ...]) -> TagReport:
    """What a transition did to a tag, with the bytes of all ranks and the seconds of the slowest."""
    return replace(
        ranks[0],
        freed_bytes=sum(report.freed_bytes for report in ranks),
        restored_bytes=sum(report.restored_bytes for report in ranks),
        saved_bytes=sum(report.saved_bytes for report in ranks),
        seconds=max(report.seconds for report in ranks),
    )
