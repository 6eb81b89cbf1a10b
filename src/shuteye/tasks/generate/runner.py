"""Steps of a model that generates: chunks packed into a batch, through the decoder, then the sampler."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias

import numpy as np

from shuteye.cache.kv_cache import KVCache
from shuteye.cache.kv_layout import KVLayout, cache_dtype
from shuteye.config import EngineConfig
from shuteye.memory.arena import Arena
from shuteye.memory.image import WeightImage
from shuteye.models.decoder import LoadedModel, bind
from shuteye.models.rank_groups import RankGroups
from shuteye.state import SCRATCH_BLOCK
from shuteye.tasks.base import ModelRunner
from shuteye.tasks.canary import Prove, fixed_tokens
from shuteye.tasks.generate.logprobs import token_logprobs
from shuteye.tasks.generate.plans import Chunk, StepPlan, StepResult
from shuteye.tasks.generate.requests import TokenLogprobs
from shuteye.tasks.generate.sampler import Sampler
from shuteye.tasks.kernels import use_kernels

Int64s: TypeAlias = np.ndarray[tuple[int], np.dtype[np.int64]]
Logits: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]

CANARY_POSITIONS = (0, 1000)
"""Of the canary's tokens: every weight is read for as few, and far apart they need every frequency of rotations."""

MAX_SHARED_TOKENS = 63
"""Of a step that the canary may share: native kernels give it the same numbers then, whatever is beside it."""


class GenerationRunner(ModelRunner):
    """Owns the KV cache, and the sampler's state of every request.

    Args:
        num_threads: compute threads, torch's and the native kernels'.
        groups: the other ranks, if the image holds a rank's part.
    """

    model: LoadedModel
    _kv_cache: KVCache  # from `attach_kv_cache` on
    _canary: StepPlan

    def __init__(
        self,
        image: WeightImage,
        weights: Arena,
        config: EngineConfig,
        *,
        num_threads: int,
        groups: RankGroups | None = None,
    ) -> None:
        is_native = use_kernels(config.kernels, num_threads)
        self.model = model = bind(image, weights, native=is_native, groups=groups)
        self._samples = model.shard is None or model.shard.holds_sampler
        cached = model.facts.attention
        self._kv_layout = KVLayout(
            num_layers=cached.num_layers,
            block_size=config.block_size,
            num_kv_heads=cached.num_kv_heads,
            head_dim=cached.head_dim,
            dtype=cache_dtype(config.kv_cache_dtype, model.dtype),
        )
        self.kv_bytes_per_token, self.kv_cache_dtype = self._kv_layout.bytes_per_token, self._kv_layout.dtype
        if not model.decoder.native_tokens:
            from shuteye.models.tensors import use_torch_threads

            use_torch_threads(num_threads)  # else its threads would spin on the cores that the kernels' own need
        self._sampler = Sampler(vocab_size=model.facts.vocab_size, eos_token_ids=model.eos_token_ids, seed=config.seed)

    def attach_kv_cache(self, arena: Arena, *, num_blocks: int) -> None:
        """Look into the KV arena; the canary's tokens go to the scratch block."""
        self._kv_cache = KVCache(arena, self._kv_layout, num_blocks=num_blocks)
        limit = min(len(CANARY_POSITIONS), self._kv_layout.block_size)
        token_ids = fixed_tokens(self.model.facts.vocab_size, limit=limit)
        chunk = Chunk(request_id="canary", token_ids=token_ids, start=0, block_ids=(SCRATCH_BLOCK,), sample=True)
        self._canary = StepPlan(chunks=(chunk,))

    def execute(self, plan: StepPlan, *, prove: Prove | None = None) -> StepResult:
        """Run the packed batch and sample; of several ranks, the one that holds the sampler alone has a result."""
        if self._samples:
            self._sampler.forget(plan.forget)
            self._sampler.admit(plan.admissions)
        logits = self._forward(plan) if prove is None else self._forward_with_canary(plan, prove)
        if not self._samples:
            return StepResult(())
        scored: tuple[tuple[TokenLogprobs, ...], ...] = ()
        if any(chunk.scoring is not None for chunk in plan.chunks):
            scored, logits = split_scored(plan, logits)
        sampling = [chunk.request_id for chunk in plan.chunks if chunk.sample]
        return StepResult(self._sampler.sample(logits, sampling, plan.masks) if sampling else (), scored)

    def _forward(self, plan: StepPlan, *, canary: bool = False) -> Logits:
        """The plan's logits; `canary`: its last chunk is the canary's."""
        batch = PackedBatch.from_plan(plan, block_size=self._kv_layout.block_size)
        if canary:
            own = CANARY_POSITIONS[: self._canary.num_tokens]
            batch.positions[-len(own) :] = np.minimum(own, self.model.facts.context_length - 1)
        return self.model.forward(batch, self._kv_cache)

    def _forward_with_canary(self, plan: StepPlan, prove: Prove) -> Logits:
        """The plan's logits; weights are read but once for it and the canary, if the canary comes out the same so."""
        shared = MAX_SHARED_TOKENS if self.model.shard is None else 0  # a stage gives more than the wanted tokens
        if plan.num_tokens + self._canary.num_tokens > min(shared, self.model.decoder.native_tokens):
            prove(self.canary_pass())
            return self._forward(plan)
        logits = self._forward(StepPlan(chunks=plan.chunks + self._canary.chunks), canary=True)
        prove(logits[-1:])
        return logits[:-1]

    def canary_pass(self) -> Logits:
        """Logits [1, vocab_size] of the last of the fixed tokens, or what the rank computed of them."""
        return self._forward(self._canary, canary=True)


# --- a packed batch and its logits -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """The tokens of a step, sequence after sequence, in plan order.

    Sequence i owns tokens [query_starts[i], query_starts[i + 1]); they are the last ones of the
    context_lengths[i] tokens whose keys and values its blocks hold after the step's writes.

    Attributes:
        input_ids, positions: int64 [num_tokens].
        slots: int64 [num_tokens]; block_id * block_size + offset of each token in the KV cache.
        query_starts: [num_sequences + 1].
        context_lengths: [num_sequences].
        block_tables: per sequence, at least ceil(context_length / block_size) block ids.
        logits_indices: int64 [num_wanted]; the tokens whose logits are wanted, in plan order: of each chunk those that
            score its prompt, then the one that is sampled from.
    """

    input_ids: Int64s
    positions: Int64s
    slots: Int64s
    query_starts: tuple[int, ...]
    context_lengths: tuple[int, ...]
    block_tables: tuple[tuple[int, ...], ...]
    logits_indices: Int64s
    block_size: int

    @classmethod
    def from_plan(cls, plan: StepPlan, *, block_size: int) -> PackedBatch:
        """Pack the plan's chunks; the work is per chunk, not per token."""
        chunks = plan.chunks
        assert chunks, "an empty step has nothing to pack"
        ends = np.cumsum([len(chunk.token_ids) for chunk in chunks])
        num_tokens = int(ends[-1])
        wanted = [index for chunk, end in zip(chunks, ends, strict=True) for index in _wanted(chunk, int(end))]
        token_ids = chain.from_iterable(chunk.token_ids for chunk in chunks)
        return cls(
            input_ids=np.fromiter(token_ids, np.int64, num_tokens),
            positions=np.concatenate([_positions(chunk) for chunk in chunks]),
            slots=np.concatenate([_slots(chunk, block_size) for chunk in chunks]),
            query_starts=(0, *ends.tolist()),
            context_lengths=tuple(chunk.start + len(chunk.token_ids) for chunk in chunks),
            block_tables=tuple(chunk.block_ids for chunk in chunks),
            logits_indices=np.asarray(wanted, dtype=np.int64),
            block_size=block_size,
        )

    @property
    def num_tokens(self) -> int:
        """Tokens computed by this step."""
        return self.query_starts[-1]


def _wanted(chunk: Chunk, end: int) -> Iterable[int]:
    """Which of the step's tokens, of which the chunk's end at `end`, need logits."""
    sampled = (end - 1,) if chunk.sample else ()
    if chunk.scoring is None:
        return sampled
    begin = end - len(chunk.token_ids) + chunk.scoring.offset
    return (*range(begin, begin + len(chunk.scoring.targets)), *sampled)


def _positions(chunk: Chunk) -> Int64s:
    return np.arange(chunk.start, chunk.start + len(chunk.token_ids), dtype=np.int64)


def _slots(chunk: Chunk, block_size: int) -> Int64s:
    """Only the blocks that the chunk writes are looked up: a table may be far longer than a chunk."""
    positions = _positions(chunk)
    first = chunk.start // block_size
    last = (chunk.start + len(chunk.token_ids) - 1) // block_size
    assert last < len(chunk.block_ids), f"{chunk.request_id}: {len(chunk.block_ids)} blocks do not cover the chunk"
    written = np.asarray(chunk.block_ids[first : last + 1], dtype=np.int64)
    return written[positions // block_size - first] * block_size + positions % block_size


def split_scored(plan: StepPlan, logits: Logits) -> tuple[tuple[tuple[TokenLogprobs, ...], ...], Logits]:
    """The scores of each scoring chunk, in plan order, and the logits of the sampling chunks.

    Args:
        logits: [num_wanted, vocab_size], the rows that `PackedBatch.logits_indices` asks for.
    """
    scored: list[tuple[TokenLogprobs, ...]] = []
    sampled: list[int] = []
    row = 0
    for chunk in plan.chunks:
        if chunk.scoring is not None:
            targets = np.asarray(chunk.scoring.targets, dtype=np.int64)
            rows = logits[row : row + len(targets)]
            scored.append(tuple(token_logprobs(rows, targets, [chunk.scoring.num_top] * len(targets))))
            row += len(targets)
        if chunk.sample:
            sampled.append(row)
            row += 1
    assert row == len(logits), f"{row} rows were wanted, {len(logits)} came"
    return tuple(scored), logits[sampled]
