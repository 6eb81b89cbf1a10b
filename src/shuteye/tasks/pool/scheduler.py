"""Decides which inputs to embed or score the next step computes, and gathers their rows per request.

Knows nothing of tensors, text or sleep: ids in, `PoolPlan` out; `PoolResult` in, `PooledDelta` out. No torch.

A request is a list of inputs, each computed whole in one step. A step takes the oldest waiting input and those most
like it in length, of whichever request, within one token budget: little is padded, and nothing waits for ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from shuteye.errors import InvalidRequest, PromptTooLong
from shuteye.model_info import PoolingInfo
from shuteye.tasks.base import ActiveRequest, TaskScheduler
from shuteye.tasks.pool.plans import PoolItem, PoolPlan, PoolResult
from shuteye.tasks.pool.requests import PooledDelta, PoolRequest

MAX_PADDING = 0.2
"""Largest share of a step's positions that may be padding."""

WINDOW = 4
"""Inputs looked at for a step, as a multiple of the most that a step takes."""


@dataclass(slots=True, eq=False)
class _Pooling(ActiveRequest):
    """A request on its way. `pending` has the indices of inputs without a row, longest first; `rows` the others' rows.

    A restart makes another object: rows that arrive for this one are then ignored.
    """

    request: PoolRequest
    pending: dict[int, None]
    rows: dict[int, bytes] = field(default_factory=dict)

    @classmethod
    def start(cls, request: PoolRequest) -> _Pooling:
        """Nothing computed yet."""
        by_length = sorted(range(len(request.inputs)), key=lambda index: -len(request.inputs[index].token_ids))
        return cls(request, dict.fromkeys(by_length))

    @property
    def delta(self) -> PooledDelta:
        """All rows, in the order of the inputs."""
        return PooledDelta(self.request_id, tuple(self.rows[index] for index in range(len(self.request.inputs))))


@dataclass(frozen=True, slots=True)
class _Waiting:
    """One input without a row."""

    pooling: _Pooling
    index: int

    @property
    def request_id(self) -> str:
        return self.pooling.request_id

    @property
    def length(self) -> int:
        return len(self.pooling.request.inputs[self.index].token_ids)

    @property
    def item(self) -> PoolItem:
        request = self.pooling.request
        return PoolItem(request.inputs[self.index], request.params)


class PoolScheduler(TaskScheduler):
    """First come, first served, with inputs of similar length batched across requests.

    Args:
        max_num_seqs: inputs in one step.
        max_num_batched_tokens: positions in one step, padding included; a longer input is computed alone.
        max_model_len: longest input in tokens.
        pooling: what the model makes of an input.
    """

    _requests: dict[str, _Pooling]

    def __init__(
        self, *, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int, pooling: PoolingInfo | None
    ) -> None:
        super().__init__()
        assert pooling is not None, "a model that embeds or scores says what it makes of an input"
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_model_len = max_model_len
        self._pooling = pooling

    # --- requests in and out ---------------------------------------------------------------------

    def add(self, request: PoolRequest) -> None:
        """Queue a request.

        Raises:
            InvalidRequest: it can never be computed, or the id is in use.
            PromptTooLong: an input is longer than the context.
        """
        self.check(request)
        self._requests[request.request_id] = _Pooling.start(request)

    def check(self, request: PoolRequest) -> None:
        """Refuse what can never run; raises as `add` does, and changes nothing."""
        super().check(request)
        if not request.inputs:
            raise InvalidRequest("input must not be empty.", param="input")
        for index, each in enumerate(request.inputs):
            self._check_length(index, len(each.token_ids))
        self._check_dimensions(request.params.dimensions)

    def _check_length(self, index: int, num_tokens: int) -> None:
        if num_tokens == 0:
            raise InvalidRequest(f"Input {index} must not be empty: it has no tokens.", param="input")
        if num_tokens > self._max_model_len:
            raise PromptTooLong(
                f"This model's maximum context length is {self._max_model_len} tokens. However, input {index} has "
                f"{num_tokens} tokens. Please reduce the length of the input prompt, or have it cut with "
                "truncate_prompt_tokens=-1.",
                param="input",
            )

    def _check_dimensions(self, wanted: int | None) -> None:
        size, allowed = self._pooling.size, self._pooling.dimensions
        if wanted is None or (wanted == size) or (1 <= wanted <= size and (allowed is None or wanted in allowed)):
            return
        possible = f"1 to {size}" if allowed is None else ", ".join(str(each) for each in sorted({*allowed, size}))
        raise InvalidRequest(
            f"dimensions must be {possible}, got {wanted}: that is what this model's embeddings can be cut to.",
            param="dimensions",
        )

    def preempt_all(self) -> int:
        """Forget the rows computed so far, so that no request mixes those of two sets of weights."""
        in_flight = {each.request_id for _, chosen in self._in_flight for each in chosen}
        begun = [each for each in self._requests.values() if each.rows or each.request_id in in_flight]
        for pooling in begun:
            self._requests[pooling.request_id] = _Pooling.start(pooling.request)
        self._num_preemptions += len(begun)
        return len(begun)

    # --- a step ----------------------------------------------------------------------------------

    def schedule(self) -> PoolPlan | None:
        """The next step, or None if there is no request at all."""
        assert not self._in_flight, "schedule() before update() or fail_step() of the previous plan"
        waiting = list(islice(self._waiting(), WINDOW * self._max_num_seqs))
        if not waiting:
            return None
        chosen = tuple(self._choose(waiting))
        starts = dict.fromkeys(each.request_id for each in chosen if not each.pooling.rows)
        plan = PoolPlan(tuple(each.item for each in chosen), tuple(starts), self._epoch)
        self._in_flight.append((plan, chosen))
        return plan

    def _waiting(self) -> Iterator[_Waiting]:
        for pooling in self._requests.values():
            for index in pooling.pending:
                yield _Waiting(pooling, index)

    def _choose(self, waiting: list[_Waiting]) -> list[_Waiting]:
        """The oldest input, and the others by how near their length is to its, as long as they fit."""
        oldest = waiting[0]
        chosen, longest, total = [oldest], oldest.length, oldest.length
        for each in sorted(waiting[1:], key=lambda each: abs(each.length - oldest.length)):
            positions = max(longest, each.length) * (len(chosen) + 1)
            padding = positions - total - each.length
            full = len(chosen) == self._max_num_seqs or positions > self._max_num_batched_tokens
            if full or padding > MAX_PADDING * positions:
                break
            chosen.append(each)
            longest, total = max(longest, each.length), total + each.length
        return chosen

    def update(self, plan: PoolPlan, result: PoolResult) -> list[PooledDelta]:
        """Take the step's rows; one delta per request that has all of its rows now."""
        chosen: tuple[_Waiting, ...] = self._land(plan)
        finished = []
        for each, row in zip(chosen, result.rows, strict=True):
            pooling = each.pooling
            if self._requests.get(each.request_id) is not pooling:  # aborted or restarted meanwhile
                continue
            del pooling.pending[each.index]
            pooling.rows[each.index] = row
            self._num_prompt_tokens += each.length
            if not pooling.pending:
                self._remove(pooling)
                finished.append(pooling.delta)
        return finished

    # --- what can be seen ------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        """Requests of which some rows are there."""
        return sum(bool(pooling.rows) for pooling in self._requests.values())
