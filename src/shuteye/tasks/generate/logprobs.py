"""Log-probabilities of chosen tokens, and of the most likely ones beside them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shuteye.tasks.generate.candidates import Floats, Int64s, logsumexp, top_k
from shuteye.tasks.generate.requests import TokenLogprobs

MAX_ROWS = 64
"""Rows looked at together: a prompt's may be many, and each is as wide as the vocabulary."""


def token_logprobs(logits: Floats, chosen: Int64s, num_top: Sequence[int]) -> list[TokenLogprobs]:
    """Per row, the chosen token's log-probability first, then those of the most likely.

    Args:
        logits: [num_rows, vocab_size] float32, as the model gave them.
        chosen: [num_rows] int64.
        num_top: how many of the most likely each row wants.
    """
    found: list[TokenLogprobs] = []
    for begin in range(0, len(logits), MAX_ROWS):
        rows = slice(begin, begin + MAX_ROWS)
        found += _of_few(logits[rows], chosen[rows], num_top[rows])
    return found


def _of_few(logits: Floats, chosen: Int64s, num_top: Sequence[int]) -> list[TokenLogprobs]:
    value = np.take_along_axis(logits, chosen[:, None], axis=-1)
    ranks = [int(np.count_nonzero(row > own)) + 1 for row, own in zip(logits, value, strict=True)]
    best = top_k(logits, width=max(num_top))
    assert best.token_ids is not None
    ids = np.concatenate([chosen[:, None], best.token_ids], axis=1).tolist()
    values = (np.concatenate([value, best.scores], axis=1) - logsumexp(logits)).tolist()
    return [
        TokenLogprobs(
            token_ids=tuple(ids[row][: count + 1]),
            logprobs=tuple(values[row][: count + 1]),
            ranks=(ranks[row], *range(1, len(ids[row][: count + 1]))),
        )
        for row, count in enumerate(num_top)
    ]
