"""Steps of a model that generates: packed batches through the decoder, then the sampler.

Knows nothing of scheduling or sleeping.
"""

from __future__ import annotations

import torch

from shuteye import native
from shuteye.cache.kv_cache import KVCache, kv_bytes_per_token
from shuteye.config import EngineConfig
from shuteye.memory.arena import Arena
from shuteye.memory.image import WeightImage
from shuteye.models.decoder import LoadedModel, bind
from shuteye.state import SCRATCH_BLOCK
from shuteye.tasks.base import ModelRunner
from shuteye.tasks.canary import Prove, fixed_tokens
from shuteye.tasks.generate.batch import PackedBatch
from shuteye.tasks.generate.logprobs import split_scored
from shuteye.tasks.generate.plans import Chunk, StepPlan, StepResult
from shuteye.tasks.generate.requests import TokenLogprobs
from shuteye.tasks.generate.sampler import Sampler

MAX_SHARED_TOKENS = 63
"""Of a step that the canary may share: native kernels give it the same numbers then, whatever is beside it."""


class GenerationRunner(ModelRunner):
    """Owns the KV cache, and the sampler's state of every request.

    Args:
        num_threads: compute threads, torch's and the native kernels'.
    """

    model: LoadedModel
    _kv_cache: KVCache  # from `attach_kv_cache` on
    _canary: StepPlan

    def __init__(self, image: WeightImage, weights: Arena, config: EngineConfig, *, num_threads: int) -> None:
        self.model = model = bind(image, weights, native=config.kernels == "auto")
        self.kv_bytes_per_token = kv_bytes_per_token(
            num_layers=model.num_layers, num_kv_heads=model.num_kv_heads, head_dim=model.head_dim, dtype=model.dtype
        )
        self._block_size = config.block_size
        if model.native_tokens:
            native.set_num_threads(num_threads)
        if model.native_tokens >= config.max_num_batched_tokens:
            torch.set_num_threads(1)  # its threads would spin on the cores that the kernels' own threads need
        self._sampler = Sampler(vocab_size=model.vocab_size, eos_token_ids=model.eos_token_ids, seed=config.seed)

    def attach_kv_cache(self, arena: Arena, *, num_blocks: int) -> None:
        """Look into the KV arena; the canary's tokens go to the scratch block."""
        model = self.model
        self._kv_cache = KVCache(
            arena,
            num_blocks=num_blocks,
            num_layers=model.num_layers,
            block_size=self._block_size,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            dtype=model.dtype,
        )
        token_ids = fixed_tokens(model.vocab_size, limit=self._block_size)
        chunk = Chunk(request_id="canary", token_ids=token_ids, start=0, block_ids=(SCRATCH_BLOCK,), sample=True)
        self._canary = StepPlan(chunks=(chunk,))

    def execute(self, plan: StepPlan, *, prove: Prove | None = None) -> StepResult:
        """Run the packed batch and sample."""
        self._sampler.forget(plan.forget)
        self._sampler.admit(plan.admissions)
        logits = self._forward(plan) if prove is None else self._forward_proven(plan, prove)
        scored: tuple[tuple[TokenLogprobs, ...], ...] = ()
        if any(chunk.scoring is not None for chunk in plan.chunks):
            scored, logits = split_scored(plan, logits)
        sampling = [chunk.request_id for chunk in plan.chunks if chunk.sample]
        return StepResult(self._sampler.sample(logits, sampling, plan.masks) if sampling else (), scored)

    def _forward(self, plan: StepPlan) -> torch.Tensor:
        batch = PackedBatch.from_plan(plan, block_size=self._block_size)
        return self.model.forward(batch, self._kv_cache)

    def _forward_proven(self, plan: StepPlan, prove: Prove) -> torch.Tensor:
        """The plan's logits; weights are read but once for it and the canary, if the canary comes out the same so."""
        if plan.num_tokens + self._canary.num_tokens > min(MAX_SHARED_TOKENS, self.model.native_tokens):
            prove(self.canary_pass())
            return self._forward(plan)
        logits = self._forward(StepPlan(chunks=plan.chunks + self._canary.chunks))
        prove(logits[-1:])
        return logits[:-1]

    def canary_pass(self) -> torch.Tensor:
        """Logits [1, vocab_size] of the last of the fixed tokens."""
        return self._forward(self._canary)
