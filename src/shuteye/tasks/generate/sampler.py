"""From logits to tokens: masks, penalties, temperature, filters, the draw and its log-probabilities.

Semantics and order are vLLM's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from random import Random

import numpy as np

from shuteye.tasks.generate.adjustments import SeenTokens, TokenRules, apply_mask, leave_some_token
from shuteye.tasks.generate.candidates import (
    Candidates,
    Filters,
    Floats,
    Int64s,
    draw,
    logsumexp,
    mask_min_p,
    top_k,
    truncate,
)
from shuteye.tasks.generate.logprobs import logprobs_of, token_logprobs
from shuteye.tasks.generate.plans import Admission, SampledToken, TokenMask
from shuteye.tasks.generate.requests import SamplingParams, TokenLogprobs

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them would overflow float32."""

SMALL_WIDTH, LARGE_WIDTH = 64, 1024
"""Numbers of most likely candidates that are looked at instead of sorting the whole vocabulary."""


class _Route(IntEnum):
    """How a row is sampled. It depends on the row's own parameters only, so that seeds mean the same in any batch."""

    GREEDY = 0
    FULL = 1  # no top_k, no top_p: every token is a candidate, in vocabulary order
    TOP_SMALL = 2  # top_k <= SMALL_WIDTH
    TOP_LARGE = 3  # top_k <= LARGE_WIDTH
    NUCLEUS = 4  # top_p alone: LARGE_WIDTH candidates if they hold the nucleus, else a sort
    SORTED = 5  # a large top_k: sort


@dataclass(slots=True)
class _Sampled:
    """The sampling state of one request."""

    params: SamplingParams
    seen: SeenTokens | None
    rules: TokenRules | None
    num_output_tokens: int = 0

    @property
    def must_go_on(self) -> bool:
        return self.num_output_tokens < self.params.min_tokens


@dataclass(frozen=True, slots=True)
class _Group:
    """The rows of a batch that take one route; `rows` is None if that is all of them."""

    route: _Route
    rows: Int64s | None
    sampled: tuple[_Sampled, ...]
    temperature: Floats  # [num_rows, 1]
    filters: Filters


@dataclass(frozen=True, slots=True)
class _Batch:
    """All that is worth keeping while the same requests are sampled step after step."""

    request_ids: tuple[str, ...]
    sampled: tuple[_Sampled, ...]
    groups: tuple[_Group, ...]
    seen: tuple[tuple[int, SeenTokens], ...]
    rules: tuple[tuple[int, TokenRules], ...]
    min_tokens_rows: tuple[int, ...]
    logprob_rows: tuple[int, ...]
    named_rows: tuple[int, ...]


class Sampler:
    """Chooses the next token of every request of a step.

    Args:
        vocab_size: width of the logits.
        eos_token_ids: masked, with a request's own stop ids, until its `min_tokens` are out.
        seed: of the generator that requests without a seed share.
    """

    def __init__(self, *, vocab_size: int, eos_token_ids: Iterable[int], seed: int) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._shared = Random(seed)
        self._requests: dict[str, _Sampled] = {}
        self._batch: _Batch | None = None

    def admit(self, admissions: Iterable[Admission]) -> None:
        """Remember requests until `forget`."""
        for admission in admissions:
            assert admission.request_id not in self._requests, f"{admission.request_id} was admitted twice"
            params, outputs = admission.params, admission.output_token_ids
            seen = SeenTokens.of(params, admission.prompt_token_ids, outputs)
            rules = TokenRules.of(params)
            if rules is not None:
                for token_id in outputs:
                    rules.record(token_id)
            self._requests[admission.request_id] = _Sampled(params, seen, rules, len(outputs))

    def forget(self, request_ids: Iterable[str]) -> None:
        """Drop the state of requests; unknown ids are ignored, since a request may end before its first step."""
        for request_id in request_ids:
            self._requests.pop(request_id, None)
            if self._batch is not None and request_id in self._batch.request_ids:
                self._batch = None

    def sample(
        self, logits: Floats, request_ids: Sequence[str], masks: Sequence[TokenMask] = ()
    ) -> tuple[SampledToken, ...]:
        """Choose one token per row and record it in the request's history.

        Args:
            logits: [num_sampled, vocab_size] float32; left as they are.
            request_ids: the admitted request of each row, all different.
            masks: what grammars allow, for those of the requests that have one.
        """
        batch = self._prepare(tuple(request_ids))
        token_ids = self._draw(self._adjust(logits, batch, masks), batch)
        for sampled in batch.sampled:
            sampled.num_output_tokens += 1
        logprobs = _logprobs(logits, token_ids, batch)
        chosen = token_ids.tolist()
        for row, rules in batch.rules:
            rules.record(chosen[row])
        for row, seen in batch.seen:
            seen.record(chosen[row])
        return tuple(
            SampledToken(request_id, token_id, logprobs.get(row))
            for row, (request_id, token_id) in enumerate(zip(batch.request_ids, chosen, strict=True))
        )

    def _prepare(self, request_ids: tuple[str, ...]) -> _Batch:
        if self._batch is None or self._batch.request_ids != request_ids:
            self._batch = self._build(request_ids)
        return self._batch

    def _build(self, request_ids: tuple[str, ...]) -> _Batch:
        sampled = tuple(self._requests[request_id] for request_id in request_ids)
        routes = [_route(one.params, self._vocab_size) for one in sampled]
        return _Batch(
            request_ids=request_ids,
            sampled=sampled,
            groups=tuple(self._group(route, routes, sampled) for route in sorted(set(routes))),
            seen=tuple((row, one.seen) for row, one in enumerate(sampled) if one.seen is not None),
            rules=tuple((row, one.rules) for row, one in enumerate(sampled) if one.rules is not None),
            min_tokens_rows=tuple(row for row, one in enumerate(sampled) if one.must_go_on),
            logprob_rows=tuple(
                row
                for row, one in enumerate(sampled)
                if one.params.logprobs is not None and one.params.logprob_token_ids is None
            ),
            named_rows=tuple(row for row, one in enumerate(sampled) if one.params.logprob_token_ids is not None),
        )

    def _group(self, route: _Route, routes: Sequence[_Route], sampled: Sequence[_Sampled]) -> _Group:
        rows = [row for row, other in enumerate(routes) if other is route]
        params = [sampled[row].params for row in rows]
        return _Group(
            route=route,
            rows=None if len(rows) == len(routes) else np.asarray(rows, dtype=np.int64),
            sampled=tuple(sampled[row] for row in rows),
            temperature=_column([param.temperature for param in params]),
            filters=Filters(
                top_k=_column([_effective_top_k(param, self._vocab_size) for param in params]),
                top_p=_column([param.top_p for param in params]),
                log_min_p=_column([math.log(param.min_p) if param.min_p else -math.inf for param in params])
                if any(param.min_p for param in params)
                else None,
            ),
        )

    def _adjust(self, logits: Floats, batch: _Batch, masks: Sequence[TokenMask]) -> Floats:
        """Apply rules of single tokens, what `min_tokens` forbids, penalties and masks; a copy if there is any."""
        pending = [row for row in batch.min_tokens_rows if batch.sampled[row].must_go_on]
        if not (pending or batch.rules or batch.seen or masks):
            return logits
        raw, logits = logits, logits.copy()
        for row, rules in batch.rules:
            rules.apply(logits[row])
        for row in pending:
            stop_token_ids = (*self._eos_token_ids, *batch.sampled[row].params.stop_token_ids)
            logits[row, [token for token in stop_token_ids if 0 <= token < self._vocab_size]] = -math.inf
        for row, seen in batch.seen:
            seen.penalize(logits[row])
        if batch.rules or masks:
            _restrict(logits, raw, batch, masks)
        return logits

    def _draw(self, logits: Floats, batch: _Batch) -> Int64s:
        """One token per row: [num_sampled] int64."""
        if len(batch.groups) == 1:
            return self._draw_group(logits, batch.groups[0])
        token_ids = np.empty(len(logits), dtype=np.int64)
        for group in batch.groups:
            token_ids[group.rows] = self._draw_group(logits[group.rows], group)
        return token_ids

    def _draw_group(self, logits: Floats, group: _Group) -> Int64s:
        if group.route is _Route.GREEDY:
            return np.asarray(logits.argmax(axis=-1), dtype=np.int64)
        scores = mask_min_p(logits / group.temperature, group.filters)
        if group.route is _Route.FULL:
            return self._pick(Candidates(scores, None), group.sampled)
        if group.route is _Route.NUCLEUS:
            return self._draw_nucleus(scores, group)
        width = {_Route.TOP_SMALL: SMALL_WIDTH, _Route.TOP_LARGE: LARGE_WIDTH}.get(group.route, self._vocab_size)
        return self._pick(truncate(top_k(scores, width=width), group.filters), group.sampled)

    def _draw_nucleus(self, scores: Floats, group: _Group) -> Int64s:
        """Draw rows whose nucleus lies within LARGE_WIDTH tokens from those, and sort only the others."""
        log_total = logsumexp(scores)
        ranked = top_k(scores, width=LARGE_WIDTH)
        held = np.exp(ranked.scores - log_total).sum(axis=-1, keepdims=True)  # [num_rows, 1]
        narrow = ((held >= group.filters.top_p) | (scores.shape[-1] <= LARGE_WIDTH))[:, 0]
        if narrow.all():
            return self._pick(truncate(ranked, group.filters, log_total=log_total), group.sampled)
        token_ids = np.empty(len(scores), dtype=np.int64)
        for mask in (narrow, ~narrow):
            rows = np.flatnonzero(mask)
            part = ranked.rows(rows) if mask is narrow else top_k(scores[rows], width=self._vocab_size)
            kept = truncate(part, group.filters.rows(rows), log_total=log_total[rows])
            token_ids[rows] = self._pick(kept, [group.sampled[row] for row in rows.tolist()])
        return token_ids

    def _pick(self, candidates: Candidates, sampled: Sequence[_Sampled]) -> Int64s:
        """One of each row's candidates, [num_rows]."""
        return draw(candidates, [self._chance(one) for one in sampled])

    def _chance(self, one: _Sampled) -> float:
        """The number in [0, 1) that decides which token is drawn.

        A seeded row's is a function of its seed and of how many tokens it has put out, and of nothing else: no batch,
        preemption or sleep can shift it.
        """
        seed = one.params.seed
        return self._shared.random() if seed is None else (_mix(seed, one.num_output_tokens) >> 11) * 2.0**-53


def _restrict(logits: Floats, raw: Floats, batch: _Batch, masks: Sequence[TokenMask]) -> None:
    """Apply grammar masks in place, and see that every row with rules or a mask has a token left."""
    rows = {request_id: row for row, request_id in enumerate(batch.request_ids)}
    rules, mask_of = dict(batch.rules), {rows[mask.request_id]: mask for mask in masks}
    for row, mask in mask_of.items():
        apply_mask(logits[row], mask)
    for row in rules.keys() | mask_of.keys():
        leave_some_token(logits[row], raw[row], rules=rules.get(row), mask=mask_of.get(row))


def _column(values: Sequence[float]) -> Floats:
    return np.asarray(values, dtype=np.float32)[:, None]


def _effective_top_k(params: SamplingParams, vocab_size: int) -> int:
    return params.top_k if 0 < params.top_k < vocab_size else vocab_size


def _route(params: SamplingParams, vocab_size: int) -> _Route:
    limit = _effective_top_k(params, vocab_size)
    if params.temperature < GREEDY_BELOW:
        return _Route.GREEDY
    if limit == vocab_size:
        return _Route.NUCLEUS if params.top_p < 1.0 else _Route.FULL
    if limit <= SMALL_WIDTH:
        return _Route.TOP_SMALL
    return _Route.TOP_LARGE if limit <= LARGE_WIDTH else _Route.SORTED


def _mix(seed: int, position: int) -> int:
    """A 64-bit hash of both (SplitMix64, doi:10.1145/2714064.2660195)."""
    mask = (1 << 64) - 1
    state = (seed * 0x9E3779B97F4A7C15 + (position + 1) * 0xD1342543DE82EF95) & mask
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return state ^ (state >> 31)


def _logprobs(logits: Floats, token_ids: Int64s, batch: _Batch) -> dict[int, TokenLogprobs]:
    """Log-probabilities of the raw logits, by row: the chosen token's first, then the most likely, or certain ones."""
    found = {
        row: logprobs_of(logits[row], int(token_ids[row]), batch.sampled[row].params.logprob_token_ids or ())
        for row in batch.named_rows
    }
    if batch.logprob_rows:
        rows = list(batch.logprob_rows)
        wanted = [batch.sampled[row].params.logprobs or 0 for row in rows]
        found |= zip(rows, token_logprobs(logits[rows], token_ids[rows], wanted), strict=True)
    return found
