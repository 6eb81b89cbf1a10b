"""Whom a rank exchanges tensors with, and what a step needs of them. Numbers are float32, or the bits of bfloat16."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shuteye.matrices.bfloat16 import Numbers
from shuteye.parallel.group import Group
from shuteye.parallel.shards import RankPlan


@dataclass(slots=True)
class RankGroups:
    """The other ranks; None where there is nobody else. Others take their place in another epoch.

    Attributes:
        tensor: the ranks of its stage; a rank's number there is its tp_rank.
        pipeline: the ranks of its tp_rank in every stage; a rank's number there is its pp_rank.
    """

    tensor: Group | None = None
    pipeline: Group | None = None

    def abort(self, reason: str) -> None:
        """End every wait of the ranks that this one would have met."""
        for group in (self.tensor, self.pipeline):
            if group is not None:
                group.abort(reason)

    def replace(self, other: RankGroups) -> None:
        """Exchange tensors in the groups of another epoch; the old ones are closed."""
        old = (self.tensor, self.pipeline)
        self.tensor, self.pipeline = other.tensor, other.pipeline
        for group in old:
            if group is not None:
                group.close()

    # --- what a step needs of them ----------------------------------------------------------------

    def receive(self, shape: tuple[int, int], dtype: str, plan: RankPlan) -> Numbers | None:
        """Hidden states of the stage before; None on the first."""
        if self.pipeline is None or plan.embeds:
            return None
        hidden = np.empty(shape, np.uint16 if dtype == "bfloat16" else np.float32)
        self.pipeline.recv(hidden, plan.spec.pp_rank - 1)
        return hidden

    def pass_on(self, hidden: Numbers, plan: RankPlan) -> None:
        """Hidden states go to the next stage, if there is one."""
        if self.pipeline is not None and not plan.has_head:
            self.pipeline.send(np.ascontiguousarray(hidden), plan.spec.pp_rank + 1)

    def add_up(self, product: Numbers) -> Numbers:
        """The sum of what the ranks of a stage have of it, in place."""
        if self.tensor is not None and product.size:
            self.tensor.all_reduce(product)
        return product

    def side_by_side(self, logits: Numbers, plan: RankPlan) -> Numbers:
        """All ranks' columns on the rank that holds the sampler; [num_sampled, columns of each]."""
        if self.tensor is None:
            return logits
        if not len(logits):
            return np.empty((0, plan.vocab_size), logits.dtype)
        gathered = self.tensor.gather(np.ascontiguousarray(logits), [len(part) for part in plan.vocabularies])
        assert (gathered is not None) == plan.holds_sampler
        return logits if gathered is None else gathered
