"""Log-probabilities of chosen tokens, of the likeliest ones, and of a prompt's tokens.

A step's logits hold rows that score prompts beside those to sample from; they are told apart here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shuteye.tasks.generate.plans import StepPlan
from shuteye.tasks.generate.requests import TokenLogprobs

MAX_ROWS = 64
"""Rows looked at together: a prompt's may be many, and each is as wide as the vocabulary."""


def token_logprobs(logits: torch.Tensor, chosen: torch.Tensor, num_top: Sequence[int]) -> list[TokenLogprobs]:
    """Per row, the chosen token's log-probability first, then the likeliest ones'.

    Args:
        logits: [num_rows, vocab_size] float32, as the model gave them.
        chosen: [num_rows] int64.
        num_top: how many of the likeliest each row wants.
    """
    found: list[TokenLogprobs] = []
    for begin in range(0, len(logits), MAX_ROWS):
        rows = slice(begin, begin + MAX_ROWS)
        found += _of_few(logits[rows], chosen[rows], num_top[rows])
    return found


def _of_few(logits: torch.Tensor, chosen: torch.Tensor, num_top: Sequence[int]) -> list[TokenLogprobs]:
    raw = logits.log_softmax(dim=-1)
    chosen = chosen.unsqueeze(1)
    value = raw.gather(1, chosen)
    rank = (raw > value).sum(dim=-1, keepdim=True) + 1
    best = raw.topk(min(max(num_top), raw.shape[-1]), dim=-1)
    ids = torch.cat([chosen, best.indices], dim=1).tolist()
    values = torch.cat([value, best.values], dim=1).tolist()
    return [
        TokenLogprobs(
            token_ids=tuple(ids[row][: count + 1]),
            logprobs=tuple(values[row][: count + 1]),
            ranks=(int(rank[row]), *range(1, len(ids[row][: count + 1]))),
        )
        for row, count in enumerate(num_top)
    ]


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
