"""Steps of a model that embeds, scores or classifies: whole inputs through the encoder, one row of numbers each.

Nothing outlives a step.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from shuteye.memory.arena import Arena
from shuteye.memory.image import WeightImage
from shuteye.models.encoder import LoadedEncoder, bind_encoder
from shuteye.tasks.base import ModelRunner
from shuteye.tasks.canary import NUM_TOKENS, Numbers, Prove, fixed_tokens
from shuteye.tasks.pool.plans import PoolPlan, PoolResult
from shuteye.tasks.pool.requests import EmbedDtype, PoolingParams, PoolInput

_DTYPES: Mapping[EmbedDtype, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


class PoolingRunner(ModelRunner):
    """Runs whole inputs; nothing is kept of them."""

    model: LoadedEncoder

    def __init__(self, image: WeightImage, weights: Arena, *, native: bool = True) -> None:
        self.model = bind_encoder(image, weights, native=native)
        limit = min(NUM_TOKENS, self.model.facts.context_length)
        self._canary = PoolInput(fixed_tokens(self.model.facts.vocab_size, limit=limit))

    @torch.inference_mode()
    def execute(self, plan: PoolPlan, *, prove: Prove | None = None) -> PoolResult:
        """Run the batch; rows with the same wishes are finished together."""
        if prove is not None:
            prove(self.canary_pass())
        rows = self.model.forward([item.input for item in plan.items])  # [num_items, size]
        wishes: dict[PoolingParams, list[int]] = {}
        for index, item in enumerate(plan.items):
            wishes.setdefault(item.params, []).append(index)
        found: dict[int, bytes] = {}
        for params, indices in wishes.items():
            finished = self.model.finish(
                rows[indices], dimensions=params.dimensions, use_activation=params.use_activation
            )
            encoded = finished.to(_DTYPES[params.embed_dtype]).contiguous().view(torch.uint8).numpy()
            for index, row in zip(indices, encoded, strict=True):
                found[index] = row.tobytes()
        return PoolResult(tuple(found[index] for index in range(len(plan.items))))

    def canary_pass(self) -> Numbers:
        """The row [1, size] of one fixed input, as the model gives it."""
        return self.model.forward([self._canary]).numpy()
