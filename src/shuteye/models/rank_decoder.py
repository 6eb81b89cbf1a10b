"""One rank's part of a Llama-like decoder: its layers and heads, computed between what other ranks send and get."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from shuteye.matrices.bfloat16 import Numbers, float32_of
from shuteye.models.flat_weights import FlatWeights
from shuteye.models.fused import FusedSpec
from shuteye.models.native_loop import NativeLoop
from shuteye.models.rank_groups import RankGroups
from shuteye.native import MAX_TOKENS, available
from shuteye.parallel.group import ShmGroup
from shuteye.parallel.shards import ShardPlan

if TYPE_CHECKING:
    from torch import Tensor

    from shuteye.cache.kv_cache import KVCache
    from shuteye.models.torch_loop import TorchLoop
    from shuteye.tasks.generate.runner import PackedBatch


class RankDecoder:
    """The rank's part of a packed step: by native kernels where they are to be had, else in torch.

    Whether they are must be the same on all ranks of a stage. The ranks' sums need shared memory then.

    Args:
        frequencies: inverse frequencies of the rotation, float32 [head_dim / 2].
        windows: of the rank's layers, how many positions back a token sees, itself included; None sees all.

    Attributes:
        native_tokens: the largest step that the native kernels compute at once; 0 if they are not used.
    """

    def __init__(
        self,
        plan: ShardPlan,
        facts: FusedSpec,
        weights: FlatWeights,
        frequencies: NDArray[np.float32],
        windows: Sequence[int | None],
        *,
        groups: RankGroups,
        native: bool = True,
    ) -> None:
        assert (groups.tensor is None) == (plan.spec.tp_size == 1), "a tensor group is for several ranks in a stage"
        assert (groups.pipeline is None) == (plan.spec.pp_size == 1), "a pipeline group is for several stages"
        self._plan = plan
        self._groups = groups
        self._dtype = weights.dtype
        self._loop: NativeLoop | TorchLoop
        if native and isinstance(groups.tensor, ShmGroup | None) and NativeLoop.computes(facts, weights.dtype):
            self.native_tokens = MAX_TOKENS
            self._loop = NativeLoop(facts, weights, frequencies)
            return
        from shuteye.models.torch_loop import TorchLoop

        self.native_tokens = 0
        self._loop = TorchLoop(
            facts, weights, frequencies, windows, native=native and available(), add_up=self._add_up_tensor
        )

    def forward(self, batch: PackedBatch, kv_cache: KVCache) -> NDArray[np.float32]:
        """Compute the rank's part of a step: take what the stage before sends, and send on.

        Returns:
            On the rank that holds the sampler, logits [num_sampled, vocab_size]. On others what they computed of
            it: their own columns of the logits, or the hidden states [num_tokens, hidden_size] that they sent.
        """
        hidden = self._groups.receive((batch.num_tokens, self._plan.shape.hidden_size), self._dtype, self._plan)
        found = self.compute(batch, kv_cache, hidden)
        self._groups.pass_on(found, self._plan)
        return float32_of(found)

    def compute(self, batch: PackedBatch, kv_cache: KVCache, hidden_in: Numbers | None) -> Numbers:
        """The part itself, within the stage.

        Args:
            hidden_in: [num_tokens, hidden_size], after the stage before; may be changed in place. None on the first.

        Returns:
            As `forward`, of the model's dtype or of float32.
        """
        if isinstance(self._loop, NativeLoop):
            group = self._groups.tensor
            assert isinstance(group, ShmGroup | None)
            found = self._loop.compute(batch, kv_cache, hidden_in=hidden_in, group=group)
        else:
            found = self._loop.compute(batch, kv_cache, hidden_in)
        return self._groups.side_by_side(found, self._plan) if self._plan.has_head else found

    def _add_up_tensor(self, product: Tensor) -> Tensor:
        from shuteye.models.tensors import numbers_of

        self._groups.add_up(numbers_of(product))
        return product
