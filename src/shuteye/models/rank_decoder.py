"""One rank's part of a Llama-like decoder: its layers and heads, and what it exchanges with the other ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import embedding

from shuteye.memory.layout import Slot
from shuteye.models.fused import FlatLoop, FusedSpec, NamedViews, Projection, RankWeights
from shuteye.parallel.group import Group, ShmGroup
from shuteye.parallel.shards import EMBEDDING, RankPlan, ShardPlan

if TYPE_CHECKING:
    from shuteye.cache.kv_cache import KVCache
    from shuteye.tasks.generate.runner import PackedBatch


@dataclass(slots=True)
class RankGroups:
    """Whom a rank exchanges tensors with; None where there is nobody else. Others take their place in another epoch.

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

    def receive(self, shape: tuple[int, int], dtype: torch.dtype, plan: RankPlan) -> Tensor | None:
        """Hidden states of the stage before; None on the first."""
        if self.pipeline is None or plan.embeds:
            return None
        hidden = torch.empty(shape, dtype=dtype)
        self.pipeline.recv(hidden, plan.spec.pp_rank - 1)
        return hidden

    def pass_on(self, hidden: Tensor, plan: RankPlan) -> None:
        """Hidden states go to the next stage, if there is one."""
        if self.pipeline is not None and not plan.has_head:
            self.pipeline.send(hidden.contiguous(), plan.spec.pp_rank + 1)

    def add_up(self, product: Tensor) -> Tensor:
        """The sum of what the ranks of a stage have of it, in place."""
        if self.tensor is not None and product.numel():
            self.tensor.all_reduce(product)
        return product

    def side_by_side(self, logits: Tensor, plan: RankPlan) -> Tensor:
        """All ranks' columns on the rank that holds the sampler; [num_sampled, columns of each]."""
        if self.tensor is None:
            return logits
        if not len(logits):
            return logits.new_empty((0, plan.vocab_size))
        gathered = self.tensor.gather(logits.contiguous(), [len(part) for part in plan.vocabularies])
        assert (gathered is not None) == plan.holds_sampler
        return logits if gathered is None else gathered


def rank_weights(
    slots: Mapping[str, Slot], view: Callable[[int, Sequence[int], str], Tensor], plan: ShardPlan
) -> RankWeights:
    """The rank's tensors with projections of one input side by side.

    Args:
        slots: by checkpoint name, tied names included; of the rank's parts.
        view: a tensor over (offset, shape, dtype) of the arena.
    """
    named = NamedViews(slots, view)
    layers = tuple(layer for index in plan.spec.layers if (layer := named.layer(f"model.layers.{index}")) is not None)
    assert len(layers) == len(plan.spec.layers), "a rank's image is laid out for the loop, whatever its sizes"
    return RankWeights(
        layers=layers,
        embedding=named[EMBEDDING] if plan.embeds else None,
        norm=named["model.norm.weight"] if plan.has_head else None,
        head=_head(named, plan) if plan.has_head else None,
    )


def _head(named: NamedViews, plan: ShardPlan) -> Projection:
    """The rank's rows; where they are the embedding's and that is here, of the whole one."""
    head = named.projection("lm_head")
    assert head is not None
    if plan.shape.tied and plan.embeds:
        return Projection(head.weight[plan.vocabulary.start : plan.vocabulary.stop], head.bias)
    return head


class RankDecoder(FlatLoop):
    """The rank's part of a packed step: small steps by native kernels where they are to be had, others by torch.

    Whether they are must be the same on all ranks of a stage. The ranks' sums need shared memory then.
    """

    def __init__(
        self,
        plan: ShardPlan,
        facts: FusedSpec,
        weights: RankWeights,
        inverse_frequencies: Tensor,
        windows: Sequence[int | None],
        *,
        groups: RankGroups,
        native: bool = True,
    ) -> None:
        assert (groups.tensor is None) == (plan.spec.tp_size == 1), "a tensor group is for several ranks in a stage"
        assert (groups.pipeline is None) == (plan.spec.pp_size == 1), "a pipeline group is for several stages"
        native = native and isinstance(groups.tensor, ShmGroup | None)
        super().__init__(facts, weights, inverse_frequencies, windows, native=native)
        self._plan = plan
        self._groups = groups

    def forward(self, batch: PackedBatch, kv_cache: KVCache) -> Tensor:
        """Compute the rank's part of a step: take what the stage before sends, and send on.

        Returns:
            On the rank that holds the sampler, logits [num_sampled, vocab_size]. On others what they computed of
            it: their own columns of the logits, or the hidden states [num_tokens, hidden_size] that they sent.
        """
        hidden = self._groups.receive((batch.num_tokens, self._plan.shape.hidden_size), self._dtype, self._plan)
        found = self.compute(batch, kv_cache, hidden)
        self._groups.pass_on(found, self._plan)
        return found

    def compute(self, batch: PackedBatch, kv_cache: KVCache, hidden_in: Tensor | None) -> Tensor:
        """The part itself, within the stage.

        Args:
            hidden_in: [num_tokens, hidden_size], after the stage before; may be changed in place. None on the first.

        Returns:
            As `forward`.
        """
        group, found = self._groups.tensor, None
        if isinstance(group, ShmGroup | None):
            found = self._compute_natively(batch, kv_cache, hidden_in=hidden_in, group=group)
        if found is None:
            found = self._compute_in_torch(batch, kv_cache, hidden_in)
        return self._groups.side_by_side(found, self._plan) if self._plan.has_head else found

    def _compute_in_torch(self, batch: PackedBatch, kv_cache: KVCache, hidden_in: Tensor | None) -> Tensor:
        """Hidden states, or the rank's columns of the logits."""
        weights = self._weights
        if hidden_in is None:
            assert weights.embedding is not None
            hidden_in = embedding(torch.from_numpy(batch.input_ids), weights.embedding)
        if weights.head is None or weights.norm is None:
            return self._compute_layers(hidden_in, batch, kv_cache, wanted=None)
        hidden = self._compute_layers(hidden_in, batch, kv_cache, wanted=torch.from_numpy(batch.logits_indices))
        return weights.head(self._norm(hidden, weights.norm))

    def _whole(self, product: Tensor) -> Tensor:
        return self._groups.add_up(product)
