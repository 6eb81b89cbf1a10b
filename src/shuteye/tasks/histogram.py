"""Counts of values by size, kept where the values come up and told with the other counters of a scheduler."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from shuteye.state import BucketCounts


class Histogram:
    """How many values were at most as large as each of `bounds`, and how many larger."""

    def __init__(self, bounds: Sequence[int]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._total = 0

    def observe(self, value: int) -> None:
        """Count one."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    @property
    def counts(self) -> BucketCounts:
        """What was counted so far."""
        return BucketCounts(tuple(self._counts), self._total)
