"""What the kernel says of another process: the memory inside address ranges of it, and what there is of it in all."""

from __future__ import annotations

import os
import re
from pathlib import Path

_HEADER = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")


def arena_rss(pid, arenas):
    """Rss in bytes of the mappings of process `pid` inside the arenas, each an address and a size."""
    total, inside = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if header := _HEADER.match(line):
            low, high = (int(part, 16) for part in header.groups())
            inside = any(low < address + nbytes and high > address for address, nbytes in arenas)
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def rollup(pid):
    """The fields of smaps_rollup, in bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines}


def own_bytes(pid):
    """Memory without a file, and its share of what it has with others: also pages that a fork has not yet touched.

    Of a fork the private ones alone would grow as it touches, one by one, those that it began with.
    """
    fields = rollup(pid)
    return fields["Anonymous"] + fields["Pss_Shmem"]


def counts(pid):
    """How many descriptors, threads and mappings it has."""
    maps = Path(f"/proc/{pid}/maps").read_text().count("\n")
    return {"fds": len(os.listdir(f"/proc/{pid}/fd")), "threads": len(os.listdir(f"/proc/{pid}/task")), "maps": maps}
