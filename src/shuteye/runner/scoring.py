"""Log-probabilities of prompt tokens: a step's logits, split into those that score prompts and those to sample from.

Knows nothing of sampling.
"""

from __future__ import annotations

import torch

from shuteye.outputs import TokenLogprobs
from shuteye.plans import StepPlan
from shuteye.runner.logprobs import token_logprobs


def split_scored(plan: StepPlan, logits: torch.Tensor) -> tuple[tuple[tuple[TokenLogprobs, ...], ...], torch.Tensor]:
    """The scores of each scoring chunk, in plan order, and the logits of the sampling chunks.

    Args:
        logits: [num_wanted, vocab_size], the rows that `PackedBatch.logits_indices` asks for.
    """
    scored: list[tuple[TokenLogprobs, ...]] = []
    sampled: list[int] = []
    row = 0
    for chunk in plan.chunks:
        if chunk.scoring is not None:
            targets = torch.tensor(chunk.scoring.targets, dtype=torch.long, device=logits.device)
            rows = logits[row : row + len(targets)]
            scored.append(tuple(token_logprobs(rows, targets, [chunk.scoring.num_top] * len(targets))))
            row += len(targets)
        if chunk.sample:
            sampled.append(row)
            row += 1
    assert row == len(logits), f"{row} rows were wanted, {len(logits)} came"
    return tuple(scored), logits[sampled]
