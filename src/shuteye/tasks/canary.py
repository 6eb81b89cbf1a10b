"""A short fixed forward pass whose numbers were recorded when the weights were last known good.

It notices what checksums cannot: a wrong address, a lost buffer, a stale view.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

from shuteye.tasks.canary_files import CanaryFile

NUM_TOKENS = 8

EPS: Mapping[str, float] = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""The distance from 1 to the next number of a dtype."""

TOLERANCE_ULPS = 4
"""Allowed difference in units of eps, relative to the largest number.

Reduction order may change with the number of threads that the system grants; corrupt memory is far outside of this.
"""

Numbers: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]

Prove = Callable[[Numbers], None]
"""Is given the canary's numbers, and raises if they are wrong."""


def fixed_tokens(vocab_size: int, *, limit: int = NUM_TOKENS) -> tuple[int, ...]:
    """Up to `limit` token ids, spread over the vocabulary."""
    stride = max(1, vocab_size // (NUM_TOKENS + 1))
    return tuple(stride * (i + 1) % vocab_size for i in range(min(NUM_TOKENS, limit)))


class Canary:
    """Records the numbers of a pass per version of the weights and compares later passes with them.

    Args:
        run: the pass; its result must depend on nothing but weights and buffers.
        eps: how exact the numbers can be: of `EPS`, the coarsest of weights and KV cache.
        kept: of versions whose record outlives this process, where it is kept.
    """

    def __init__(self, run: Callable[[], Numbers], *, eps: float, kept: Mapping[str, CanaryFile] | None = None) -> None:
        self._run = run
        self._tolerance = TOLERANCE_ULPS * eps
        self._kept = kept or {}
        self._recorded: dict[str, Numbers] = {}

    def forget(self, version: str) -> None:
        """Drop what was recorded for a version of the weights that is gone for good."""
        self._recorded.pop(version, None)

    def agrees(self, version: str) -> bool:
        """Run the pass; True if its numbers match those of this version, or are the first seen of it."""
        return self.knows(self._run(), version)

    def knows(self, found: Numbers, version: str) -> bool:
        """`agrees`, for the numbers of a pass that was run elsewhere.

        The first numbers of a version are recorded only if all of them are finite.
        """
        if not np.isfinite(found).all():
            return False
        recorded = self._record(version, found)
        if recorded.shape != found.shape:
            return False
        limit = self._tolerance * float(np.abs(recorded).max())
        return float(np.abs(found - recorded).max()) <= limit

    def _record(self, version: str, found: Numbers) -> Numbers:
        """What was recorded of a version, by this process or one before it; of a new one, `found`."""
        if version not in self._recorded:
            file = self._kept.get(version)
            earlier = None if file is None else file.read()
            if earlier is None:
                earlier = found.copy()
                if file is not None:
                    file.write(earlier)
            self._recorded[version] = earlier.reshape(found.shape) if earlier.size == found.size else earlier
        return self._recorded[version]
