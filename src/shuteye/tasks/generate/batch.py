"""One step's chunks as packed one-dimensional tensors, ready for the model.

Knows nothing of models, sampling or who asked.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from shuteye.tasks.generate.plans import Chunk, StepPlan


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

    input_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    query_starts: tuple[int, ...]
    context_lengths: tuple[int, ...]
    block_tables: tuple[tuple[int, ...], ...]
    logits_indices: torch.Tensor
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
            input_ids=torch.from_numpy(np.fromiter(token_ids, np.int64, num_tokens)),
            positions=torch.from_numpy(np.concatenate([_positions(chunk) for chunk in chunks])),
            slots=torch.from_numpy(np.concatenate([_slots(chunk, block_size) for chunk in chunks])),
            query_starts=(0, *ends.tolist()),
            context_lengths=tuple(chunk.start + len(chunk.token_ids) for chunk in chunks),
            block_tables=tuple(chunk.block_ids for chunk in chunks),
            logits_indices=torch.from_numpy(np.asarray(wanted, dtype=np.int64)),
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


def _positions(chunk: Chunk) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.arange(chunk.start, chunk.start + len(chunk.token_ids), dtype=np.int64)


def _slots(chunk: Chunk, block_size: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Only the blocks that the chunk writes are looked up: a table may be far longer than a chunk."""
    positions = _positions(chunk)
    first = chunk.start // block_size
    last = (chunk.start + len(chunk.token_ids) - 1) // block_size
    assert last < len(chunk.block_ids), f"{chunk.request_id}: {len(chunk.block_ids)} blocks do not cover the chunk"
    written = np.asarray(chunk.block_ids[first : last + 1], dtype=np.int64)
    return written[positions // block_size - first] * block_size + positions % block_size
