"""One step of a model that embeds or scores, and its result, as frozen data. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from shuteye.state import Epoch
from shuteye.tasks.pool.requests import PoolingParams, PoolInput


@dataclass(frozen=True, slots=True)
class PoolItem:
    """One input of a step, and what is wanted of its row."""

    input: PoolInput
    params: PoolingParams


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """One forward pass over whole inputs, padded to the longest; nothing of it outlives the step.

    `starts` names the requests of which it is the first step.
    """

    items: tuple[PoolItem, ...]
    starts: tuple[str, ...] = ()
    epoch: Epoch = ()

    @property
    def num_tokens(self) -> int:
        """Tokens computed by this step, without padding."""
        return sum(len(item.input.token_ids) for item in self.items)


@dataclass(frozen=True, slots=True)
class PoolResult:
    """One row of float32 per item, in the order of the plan."""

    rows: tuple[bytes, ...]
