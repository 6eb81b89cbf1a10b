"""Log-probabilities of chosen tokens, and beside them of the most likely ones, or of those that were asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shuteye.tasks.generate.candidates import Floats, Int64s, logsumexp, top_k
from shuteye.tasks.generate.logprob_limits import NARROW
from shuteye.tasks.generate.requests import TokenLogprobs

MAX_ROWS = 64
"""Rows looked at together: a prompt's may be many, and each is as wide as the vocabulary."""


def token_logprobs(logits: Floats, chosen: Int64s, num_top: Sequence[int]) -> list[TokenLogprobs]:
    """Per row, the chosen token's log-probability first, then those of the most likely.

    Args:
        logits: [num_rows, vocab_size] float32, as the model gave them.
        chosen: [num_rows] int64.
        num_top: how many of the most likely each row wants; what one wants costs the others nothing.
    """
    found: dict[int, TokenLogprobs] = {}
    narrow = [row for row, count in enumerate(num_top) if count <= NARROW]
    for begin in range(0, len(narrow), MAX_ROWS):
        rows = narrow[begin : begin + MAX_ROWS]
        few = logits[rows[0] : rows[-1] + 1] if len(rows) == rows[-1] + 1 - rows[0] else logits[rows]
        found |= zip(rows, _of_few(few, chosen[rows], [num_top[row] for row in rows]), strict=True)
    for row in sorted(set(range(len(logits))) - set(narrow)):
        [found[row]] = _of_few(logits[row : row + 1], chosen[row : row + 1], [num_top[row]])
    return [found[row] for row in range(len(logits))]


def logprobs_of(row: Floats, chosen: int, token_ids: Sequence[int]) -> TokenLogprobs:
    """The log-probabilities of the chosen token and of certain ones, each with its rank.

    Args:
        row: [vocab_size] float32, as the model gave it.
    """
    ids = (chosen, *(token_id for token_id in token_ids if token_id != chosen))
    values = row[list(ids)]
    ranks = [int(np.count_nonzero(row > value)) + 1 for value in values]
    return TokenLogprobs(ids, tuple((values - logsumexp(row[None])[0]).tolist()), tuple(ranks))


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
