"""What the system says of the memory of a process, by its id; 0 of one that has ended, or of another user."""

from __future__ import annotations

from pathlib import Path

from shuteye.memory.limits import read_fields

_PRIVATE = ("Private_Clean", "Private_Dirty", "Private_Hugetlb")


def private_bytes(pid: int) -> int:
    """What its end would give back: memory that it shares with no other (proc(5), smaps_rollup)."""
    found = _fields(pid, "smaps_rollup")
    return sum(found.get(name, 0) for name in _PRIVATE)


def bytes_below_peak(pid: int) -> int:
    """How much more it has had in memory than it has now (proc(5), VmHWM and VmRSS of its status)."""
    found = _fields(pid, "status")
    return max(0, found.get("VmHWM", 0) - found.get("VmRSS", 0))


def _fields(pid: int, file: str) -> dict[str, int]:
    try:
        return read_fields(Path(f"/proc/{pid}/{file}"), unit_bytes=1024)
    except OSError:
        return {}
