"""A short fixed forward pass whose logits were recorded when the weights were last known good.

Knows nothing of when it is due; it notices what checksums cannot: a wrong address, a lost buffer, a stale view.
"""

from __future__ import annotations

import torch

from shuteye.cache.kv_cache import KVCache
from shuteye.models.loader import LoadedModel
from shuteye.plans import SCRATCH_BLOCK, Chunk, StepPlan
from shuteye.runner.batch import PackedBatch

NUM_TOKENS = 8

TOLERANCE_ULPS = 4
"""Allowed difference in units of the dtype's eps, relative to the largest logit.

Reduction order may change with the number of threads that the system grants; corrupt memory is far outside of this.
"""


class Canary:
    """Records logits per version of the weights and compares later passes with them."""

    def __init__(self, model: LoadedModel, kv_cache: KVCache, *, block_size: int) -> None:
        self._model = model
        self._kv_cache = kv_cache
        stride = max(1, model.vocab_size // (NUM_TOKENS + 1))
        token_ids = tuple(stride * (i + 1) % model.vocab_size for i in range(min(NUM_TOKENS, block_size)))
        chunk = Chunk(request_id="canary", token_ids=token_ids, start=0, block_ids=(SCRATCH_BLOCK,), sample=True)
        self._batch = PackedBatch.from_plan(StepPlan(chunks=(chunk,)), block_size=block_size)
        self._recorded: dict[str, torch.Tensor] = {}

    def forget(self, version: str) -> None:
        """Drop what was recorded for a version of the weights that is gone for good."""
        self._recorded.pop(version, None)

    def agrees(self, version: str) -> bool:
        """Run the pass; True if its logits match those of this version, or are the first seen of it.

        The first pass of a version is recorded only if all of its logits are finite.
        """
        logits = self._model.forward(self._batch, self._kv_cache)  # [1, vocab]
        if not bool(torch.isfinite(logits).all()):
            return False
        recorded = self._recorded.setdefault(version, logits.clone())
        limit = TOLERANCE_ULPS * torch.finfo(self._model.dtype).eps * float(recorded.abs().max())
        return float((logits - recorded).abs().max()) <= limit
