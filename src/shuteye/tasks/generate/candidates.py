"""The tokens that may be drawn: found among the logits, filtered, and one of them drawn.

Rows are independent of each other: what a row's numbers are depends on that row alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]
Int64s: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]

_PIECE = 256
"""Neighbours that are added up before anything is looked for among their sums."""

_NUM_GROUPS = 4096
_MANY_WAYS = 4
"""So many more groups than candidates are wanted, that two of these are seldom in one."""


@dataclass(frozen=True, slots=True)
class Filters:
    """Truncation per row; arrays are [num_rows, 1]. `top_k` is at least 1, `log_min_p` is -inf where unused."""

    top_k: Floats
    top_p: Floats
    log_min_p: Floats | None

    def rows(self, rows: Int64s) -> Filters:
        """The filters of some of the rows."""
        log_min_p = None if self.log_min_p is None else self.log_min_p[rows]
        return Filters(self.top_k[rows], self.top_p[rows], log_min_p)


@dataclass(frozen=True, slots=True)
class Candidates:
    """Tokens that may be drawn: `scores` [num_rows, width], -inf if filtered; `token_ids` alike, None if 0, 1, 2, …"""

    scores: Floats
    token_ids: Int64s | None

    def rows(self, rows: Int64s) -> Candidates:
        """The candidates of some of the rows."""
        return Candidates(self.scores[rows], None if self.token_ids is None else self.token_ids[rows])


def mask_min_p(scores: Floats, filters: Filters) -> Floats:
    """`scores` with -inf where a token is less than `min_p` times as likely as the most likely one."""
    if filters.log_min_p is None:
        return scores
    threshold = scores.max(axis=-1, keepdims=True) + filters.log_min_p
    return np.where(scores < threshold, -np.inf, scores)


def logsumexp(scores: Floats) -> Floats:
    """[num_rows, width] → [num_rows, 1]."""
    return np.stack([_logsumexp(row) for row in scores])[:, None]


def _logsumexp(row: Floats) -> Any:
    largest = row.max()
    return largest + np.log(_weights(row, largest).sum())


def _weights(row: Floats, largest: Any) -> Floats:
    """How likely each token is, the likeliest having 1. A row at a time stays in the processor's caches."""
    with np.errstate(invalid="ignore"):  # of a row of -inf alone
        weights = row - largest
    found: Floats = np.exp(weights, out=weights)
    return found


def top_k(scores: Floats, *, width: int) -> Candidates:
    """The `width` most likely of `scores` [num_rows, vocab_size], in falling order; the first of equals first."""
    token_ids = np.stack([_best(row, width) for row in scores])
    return Candidates(np.take_along_axis(scores, token_ids, axis=-1), token_ids)


def _best(row: Floats, width: int) -> Int64s:
    """Where the `width` largest of a row are, or all; only those that may be among them are sorted."""
    if width == 0:
        return np.empty(0, dtype=np.int64)
    if width >= len(row):
        return _falling(row, np.arange(len(row)))
    return _falling(row, np.flatnonzero(row >= _bound(row, width)))[:width]


def _bound(row: Floats, width: int) -> Any:
    """What at least `width` of the row are not below, and few more: of groups of columns, only the largest count."""
    among = row
    if _MANY_WAYS * width <= _NUM_GROUPS and len(row) >= 2 * _NUM_GROUPS:
        among = row[: len(row) - len(row) % _NUM_GROUPS].reshape(-1, _NUM_GROUPS).max(axis=0)
    return np.partition(among, len(among) - width)[len(among) - width]


def _falling(row: Floats, places: Int64s) -> Int64s:
    """`places` by falling value, equal ones as given; by one sort of whole numbers, which numpy has a fast one for."""
    bits = row[places].view(np.int32)
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as signed numbers in the order of the floats
    keys = (~rising).astype(np.int64) << 32 | places
    keys.sort()
    return keys & 0xFFFFFFFF


def truncate(ranked: Candidates, filters: Filters, *, log_total: Floats | None = None) -> Candidates:
    """`ranked`, which falls along each row, filtered by top_k, then by top_p among what top_k left.

    Of equal scores at an edge the first stay: never more than top_k.

    Args:
        ranked: all tokens that top_k, or the nucleus, could keep; perhaps more.
        filters: of the same rows.
        log_total: [num_rows, 1], the logsumexp of what top_k leaves, where that is more than `ranked`.
    """
    place = np.arange(ranked.scores.shape[-1])
    best = np.where(place >= filters.top_k, -np.inf, ranked.scores)
    if bool((filters.top_p >= 1.0).all()):
        return Candidates(best, ranked.token_ids)
    probs = np.exp(best - (logsumexp(best) if log_total is None else log_total), dtype=np.float64)
    before = probs.cumsum(axis=-1) - probs  # [num_rows, width]: how likely all better tokens are together
    outside = (before >= filters.top_p) & (filters.top_p < 1.0)
    outside[:, 0] = False
    return Candidates(np.where(outside, -np.inf, best), ranked.token_ids)


def draw(candidates: Candidates, chances: Sequence[float]) -> Int64s:
    """One token per row, [num_rows], with the probabilities that softmax gives: where the row's chance falls.

    Args:
        chances: of each row one in [0, 1); they alone decide.
    """
    pairs = zip(candidates.scores, chances, strict=True)
    places = [_place(_weights(row, row.max()), chance) for row, chance in pairs]
    token_ids = np.asarray(places, dtype=np.int64)
    if candidates.token_ids is None:
        return token_ids
    return candidates.token_ids[np.arange(len(places)), token_ids]


def _place(weights: Floats, chance: float) -> int:
    """The first place at which the sum of weights exceeds `chance` of their total; never one of weight 0."""
    sums = np.add.reduceat(weights, np.arange(0, len(weights), _PIECE), dtype=np.float64).cumsum()
    piece, left = _first_above(sums, chance * sums[-1])
    begin = piece * _PIECE
    return begin + _first_above(weights[begin : begin + _PIECE].cumsum(dtype=np.float64), left)[0]


def _first_above(upto: np.ndarray[Any, np.dtype[np.float64]], target: float) -> tuple[int, float]:
    """Where a rising sum first exceeds `target`, or else first reaches its end; and what of `target` is left there."""
    place = int(min(upto.searchsorted(target, side="right"), upto.searchsorted(upto[-1])))
    return place, target - (float(upto[place - 1]) if place else 0.0)
