"""From logits to tokens: masks, penalties, temperature, filters, the draw and its log-probabilities.

Semantics and order are vLLM's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch

from shuteye.tasks.generate.adjustments import PenaltyRows, TokenCounts, TokenRules, apply_mask, leave_some_token
from shuteye.tasks.generate.plans import Admission, SampledToken, TokenMask
from shuteye.tasks.generate.requests import SamplingParams, TokenLogprobs

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them would overflow float32."""

SMALL_WIDTH, LARGE_WIDTH = 64, 1024
"""Numbers of most likely candidates that are looked at instead of sorting the whole vocabulary."""


MAX_ROWS = 64
"""Rows looked at together: a prompt's may be many, and each is as wide as the vocabulary."""


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
    slot: int | None  # in TokenCounts, if the request has penalties
    rules: TokenRules | None
    num_output_tokens: int = 0

    @property
    def must_go_on(self) -> bool:
        return self.num_output_tokens < self.params.min_tokens


@dataclass(frozen=True, slots=True)
class Filters:
    """Truncation per row; tensors are [num_rows, 1]. `top_k` is at least 1, `log_min_p` is -inf where unused."""

    top_k: torch.Tensor
    top_p: torch.Tensor
    log_min_p: torch.Tensor | None

    def rows(self, rows: torch.Tensor) -> Filters:
        """The filters of some of the rows."""
        log_min_p = None if self.log_min_p is None else self.log_min_p[rows]
        return Filters(self.top_k[rows], self.top_p[rows], log_min_p)


@dataclass(frozen=True, slots=True)
class Candidates:
    """Tokens that may be drawn: `scores` [num_rows, width], -inf if filtered; `token_ids` alike, None if 0, 1, 2, …"""

    scores: torch.Tensor
    token_ids: torch.Tensor | None

    def rows(self, rows: torch.Tensor) -> Candidates:
        """The candidates of some of the rows."""
        return Candidates(self.scores[rows], None if self.token_ids is None else self.token_ids[rows])


@dataclass(frozen=True, slots=True)
class _Group:
    """The rows of a batch that take one route; `rows` is None if that is all of them."""

    route: _Route
    rows: torch.Tensor | None
    sampled: tuple[_Sampled, ...]
    temperature: torch.Tensor  # [num_rows, 1]
    filters: Filters


@dataclass(frozen=True, slots=True)
class _Batch:
    """All that is worth keeping while the same requests are sampled step after step."""

    request_ids: tuple[str, ...]
    sampled: tuple[_Sampled, ...]
    groups: tuple[_Group, ...]
    penalties: PenaltyRows | None
    rules: tuple[tuple[int, TokenRules], ...]
    min_tokens_rows: tuple[int, ...]
    logprob_rows: tuple[int, ...]


class Sampler:
    """Chooses the next token of every request of a step.

    Args:
        vocab_size: width of the logits.
        eos_token_ids: masked, with a request's own stop ids, until its `min_tokens` are out.
        seed: of the generator that requests without a seed share.
        device: where logits live.
    """

    def __init__(
        self, *, vocab_size: int, eos_token_ids: Iterable[int], seed: int, device: torch.device | str = "cpu"
    ) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._device = torch.device(device)
        self._shared = torch.Generator(self._device)
        self._shared.manual_seed(seed)
        self._seeded = torch.Generator(self._device)
        self._counts = TokenCounts(vocab_size=vocab_size, device=self._device)
        self._requests: dict[str, _Sampled] = {}
        self._batch: _Batch | None = None

    def admit(self, admissions: Iterable[Admission]) -> None:
        """Remember requests until `forget`."""
        for admission in admissions:
            assert admission.request_id not in self._requests, f"{admission.request_id} was admitted twice"
            params, outputs = admission.params, admission.output_token_ids
            slot = self._counts.add(admission.prompt_token_ids, outputs) if _has_penalties(params) else None
            rules = TokenRules.of(params, device=self._device)
            if rules is not None:
                for token_id in outputs:
                    rules.record(token_id)
            self._requests[admission.request_id] = _Sampled(params, slot, rules, len(outputs))

    def forget(self, request_ids: Iterable[str]) -> None:
        """Drop the state of requests; unknown ids are ignored, since a request may end before its first step."""
        for request_id in request_ids:
            sampled = self._requests.pop(request_id, None)
            if sampled is not None and sampled.slot is not None:
                self._counts.release(sampled.slot)
            if self._batch is not None and request_id in self._batch.request_ids:
                self._batch = None

    def sample(
        self, logits: torch.Tensor, request_ids: Sequence[str], masks: Sequence[TokenMask] = ()
    ) -> tuple[SampledToken, ...]:
        """Choose one token per row and record it in the request's history.

        Args:
            logits: [num_sampled, vocab_size] float32; left as they are.
            request_ids: the admitted request of each row, all different.
            masks: what grammars allow, for those of the requests that have one.
        """
        batch = self._prepare(tuple(request_ids))
        token_ids = self._draw(self._adjust(logits, batch, masks), batch)
        if batch.penalties is not None:
            self._counts.record(batch.penalties, token_ids)
        for sampled in batch.sampled:
            sampled.num_output_tokens += 1
        logprobs = _logprobs(logits, token_ids, batch)
        chosen = token_ids.tolist()
        for row, rules in batch.rules:
            rules.record(chosen[row])
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
        penalized = [(row, one.slot, one.params) for row, one in enumerate(sampled) if one.slot is not None]
        return _Batch(
            request_ids=request_ids,
            sampled=sampled,
            groups=tuple(self._group(route, routes, sampled) for route in sorted(set(routes))),
            penalties=self._counts.rows(*zip(*penalized, strict=True)) if penalized else None,
            rules=tuple((row, one.rules) for row, one in enumerate(sampled) if one.rules is not None),
            min_tokens_rows=tuple(row for row, one in enumerate(sampled) if one.must_go_on),
            logprob_rows=tuple(row for row, one in enumerate(sampled) if one.params.logprobs is not None),
        )

    def _group(self, route: _Route, routes: Sequence[_Route], sampled: Sequence[_Sampled]) -> _Group:
        rows = [row for row, other in enumerate(routes) if other is route]
        params = [sampled[row].params for row in rows]
        return _Group(
            route=route,
            rows=None if len(rows) == len(routes) else torch.tensor(rows, device=self._device),
            sampled=tuple(sampled[row] for row in rows),
            temperature=self._column([param.temperature for param in params]),
            filters=Filters(
                top_k=self._column([_effective_top_k(param, self._vocab_size) for param in params]),
                top_p=self._column([param.top_p for param in params]),
                log_min_p=self._column([math.log(param.min_p) if param.min_p else -math.inf for param in params])
                if any(param.min_p for param in params)
                else None,
            ),
        )

    def _column(self, values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device).unsqueeze(1)

    def _adjust(self, logits: torch.Tensor, batch: _Batch, masks: Sequence[TokenMask]) -> torch.Tensor:
        """Apply rules of single tokens, what `min_tokens` forbids, penalties and masks; a copy if there is any."""
        pending = [row for row in batch.min_tokens_rows if batch.sampled[row].must_go_on]
        if not (pending or batch.rules or masks) and batch.penalties is None:
            return logits
        raw, logits = logits, logits.clone()
        for row, rules in batch.rules:
            rules.apply(logits[row])
        for row in pending:
            stop_token_ids = (*self._eos_token_ids, *batch.sampled[row].params.stop_token_ids)
            logits[row, [token for token in stop_token_ids if 0 <= token < self._vocab_size]] = -math.inf
        if batch.penalties is not None:
            self._counts.penalize(logits, batch.penalties)
        if batch.rules or masks:
            _restrict(logits, raw, batch, masks)
        return logits

    def _draw(self, logits: torch.Tensor, batch: _Batch) -> torch.Tensor:
        """One token per row: [num_sampled] int64."""
        if len(batch.groups) == 1:
            return self._draw_group(logits, batch.groups[0])
        token_ids = torch.empty(len(logits), dtype=torch.long, device=self._device)
        for group in batch.groups:
            token_ids[group.rows] = self._draw_group(logits[group.rows], group)
        return token_ids

    def _draw_group(self, logits: torch.Tensor, group: _Group) -> torch.Tensor:
        if group.route is _Route.GREEDY:
            return largest(logits)
        scores = mask_min_p(logits / group.temperature, group.filters)
        if group.route is _Route.FULL:
            return self._pick(Candidates(scores, None), group.sampled)
        if group.route is _Route.NUCLEUS:
            return self._draw_nucleus(scores, group)
        width = {_Route.TOP_SMALL: SMALL_WIDTH, _Route.TOP_LARGE: LARGE_WIDTH}.get(group.route, self._vocab_size)
        return self._pick(truncate(top_k(scores, width=width), group.filters), group.sampled)

    def _draw_nucleus(self, scores: torch.Tensor, group: _Group) -> torch.Tensor:
        """Draw rows whose nucleus lies within LARGE_WIDTH tokens from those, and sort only the others."""
        log_total = scores.logsumexp(dim=-1, keepdim=True)
        ranked = top_k(scores, width=LARGE_WIDTH)
        held = (ranked.scores - log_total).exp().sum(dim=-1, keepdim=True)  # [num_rows, 1]
        narrow = ((held >= group.filters.top_p) | (scores.shape[-1] <= LARGE_WIDTH)).squeeze(1)
        if narrow.all():
            return self._pick(truncate(ranked, group.filters, log_total=log_total), group.sampled)
        token_ids = torch.empty(len(scores), dtype=torch.long, device=self._device)
        for mask in (narrow, ~narrow):
            rows = mask.nonzero().squeeze(1)
            part = ranked.rows(rows) if mask is narrow else top_k(scores[rows], width=self._vocab_size)
            kept = truncate(part, group.filters.rows(rows), log_total=log_total[rows])
            token_ids[rows] = self._pick(kept, [group.sampled[row] for row in rows.tolist()])
        return token_ids

    def _pick(self, candidates: Candidates, sampled: Sequence[_Sampled]) -> torch.Tensor:
        """Gumbel-max: the argmax of `score - log(Exp(1))` is a draw from softmax(score)."""
        noise = self._noise(candidates.scores, sampled)
        index = largest(candidates.scores - noise.log_()).unsqueeze(1)
        if candidates.token_ids is not None:
            index = candidates.token_ids.gather(1, index)
        return index.squeeze(1)

    def _noise(self, scores: torch.Tensor, sampled: Sequence[_Sampled]) -> torch.Tensor:
        """Exp(1) noise shaped as `scores`.

        A seeded row's is a function of its seed and of how many tokens it has put out, and of nothing else: no batch,
        preemption or sleep can shift it.
        """
        noise = torch.empty_like(scores)
        if any(one.params.seed is None for one in sampled):
            noise.exponential_(generator=self._shared)
        for row, one in enumerate(sampled):
            if one.params.seed is not None:
                self._seeded.manual_seed(_mix(one.params.seed, one.num_output_tokens))
                noise[row].exponential_(generator=self._seeded)
        return noise.clamp_(min=torch.finfo(noise.dtype).tiny)  # log(0) would let a filtered token win


def _restrict(logits: torch.Tensor, raw: torch.Tensor, batch: _Batch, masks: Sequence[TokenMask]) -> None:
    """Apply grammar masks in place, and see that every row with rules or a mask has a token left."""
    rows = {request_id: row for row, request_id in enumerate(batch.request_ids)}
    rules, mask_of = dict(batch.rules), {rows[mask.request_id]: mask for mask in masks}
    for row, mask in mask_of.items():
        apply_mask(logits[row], mask)
    for row in rules.keys() | mask_of.keys():
        leave_some_token(logits[row], raw[row], rules=rules.get(row), mask=mask_of.get(row))


def largest(scores: torch.Tensor) -> torch.Tensor:
    """Where each row of `scores` [num_rows, width] is largest, first of equals: [num_rows] int64.

    On the CPU by numpy, whose argmax is vectorized: 16 rows of 49,152 take 0.1 ms, torch's 1.4 ms.
    """
    if scores.device.type != "cpu":
        return scores.argmax(dim=-1)
    return torch.from_numpy(scores.numpy().argmax(axis=-1))


def mask_min_p(scores: torch.Tensor, filters: Filters) -> torch.Tensor:
    """`scores` with -inf where a token is less than `min_p` times as likely as the most likely one."""
    if filters.log_min_p is None:
        return scores
    threshold = scores.amax(dim=-1, keepdim=True) + filters.log_min_p
    return scores.masked_fill(scores < threshold, -math.inf)


def top_k(scores: torch.Tensor, *, width: int) -> Candidates:
    """The `width` most likely of `scores` [num_rows, vocab_size], in falling order."""
    if width >= scores.shape[-1]:
        return Candidates(*scores.sort(dim=-1, descending=True, stable=True))
    return Candidates(*scores.topk(width, dim=-1))


def truncate(ranked: Candidates, filters: Filters, *, log_total: torch.Tensor | None = None) -> Candidates:
    """`ranked`, which falls along each row, filtered by top_k, then by top_p among what top_k left.

    Of equal scores at an edge, which stay is arbitrary, but never more than top_k.

    Args:
        ranked: all tokens that top_k, or the nucleus, could keep; perhaps more.
        filters: of the same rows.
        log_total: [num_rows, 1], the logsumexp of what top_k leaves, where that is more than `ranked`.
    """
    place = torch.arange(ranked.scores.shape[-1], device=ranked.scores.device)
    best = ranked.scores.masked_fill(place >= filters.top_k, -math.inf)
    if log_total is None:
        log_total = best.logsumexp(dim=-1, keepdim=True)
    probs = (best - log_total).exp()
    before = probs.cumsum(dim=-1) - probs  # [num_rows, width]: how likely all better tokens are together
    outside = (before >= filters.top_p) & (filters.top_p < 1.0)
    outside[:, 0] = False
    return Candidates(best.masked_fill(outside, -math.inf), ranked.token_ids)


def _has_penalties(params: SamplingParams) -> bool:
    neutral = (1.0, 0.0, 0.0)
    return (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != neutral


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
    """A 64-bit hash of both (SplitMix64, doi:10.1145/2714064.2660195); its low half seeds a Mersenne twister well."""
    mask = (1 << 64) - 1
    state = (seed * 0x9E3779B97F4A7C15 + (position + 1) * 0xD1342543DE82EF95) & mask
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return state ^ (state >> 31)


def _logprobs(logits: torch.Tensor, token_ids: torch.Tensor, batch: _Batch) -> dict[int, TokenLogprobs]:
    """Log-probabilities of the raw logits, by row: the chosen token's first, then the most likely ones."""
    if not batch.logprob_rows:
        return {}
    rows = list(batch.logprob_rows)
    wanted = [batch.sampled[row].params.logprobs or 0 for row in rows]
    return dict(zip(rows, token_logprobs(logits[rows], token_ids[rows], wanted), strict=True))


def token_logprobs(logits: torch.Tensor, chosen: torch.Tensor, num_top: Sequence[int]) -> list[TokenLogprobs]:
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
