"""Decides what the next step of the model computes, and what its tokens mean for each request.

Knows nothing of tensors, text or sleep: ids in, `StepPlan` out; `StepResult` in, `RequestDelta` out. No torch.

There is no prefill phase. A sequence is a list of known tokens, of which the first `num_computed` have K/V; a step
computes some of the rest, within one token budget over all sequences. When it catches up, a token is sampled.

    tokens   [0 ........ num_computed) [num_computed ........ len(token_ids))
              in the KV cache           to be computed; the last one's logits choose the next token

Where stages of a pipeline compute different plans at once, several plans are in flight, which every rank executes in
the order in which they were scheduled. A sequence whose next token is being sampled is in no further plan, but the next
chunk of a prompt is scheduled before the chunk in front of it has come back. See ADR 22.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, replace

from shuteye.cache.blocks import BlockPool, HashChain, PrefixCache
from shuteye.errors import ErrorInfo, InvalidRequest, PromptTooLong
from shuteye.state import PREEMPTION_BOUNDS, RESERVED_BLOCKS, STEP_TOKEN_BOUNDS, Epoch, SchedulerStats
from shuteye.tasks.base import RequestDelta, TaskScheduler
from shuteye.tasks.generate.logprob_limits import scored_per_step
from shuteye.tasks.generate.plans import Admission, Chunk, SampledToken, StepPlan, StepResult
from shuteye.tasks.generate.requests import FinishReason, GenerateRequest, TokenLogprobs
from shuteye.tasks.generate.sequences import ActiveSequence, Batch, Part
from shuteye.tasks.histogram import Histogram

MAX_SCORED_CHUNK = 256
"""Prompt tokens computed in one step if their logits are wanted, each of which is as wide as the vocabulary."""

MIN_STAGE_SEQUENCES = 8
"""Sequences that are worth a step of their own beside others: each step reads all weights, however few there are."""

MAX_STAGE_TOKENS = 256
"""Tokens of prompts in one step of several in flight: small enough that stages work on one prompt at the same time."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a batch.

    Attributes:
        num_blocks: blocks of the KV cache, block 0 included.
        max_num_seqs: requests in one batch.
        max_num_batched_tokens: the token budget of one step.
        max_model_len: longest prompt plus output in tokens; also bounded by what the blocks can hold.
        max_in_flight: plans that may be in flight at a time.
    """

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_in_flight: int = 1


class Scheduler(TaskScheduler):
    """Continuous batching over one token budget, with chunked prefill, prefix sharing and preemption by recompute.

    Requests in the batch come first, in the order they were admitted; then waiting ones by priority, then arrival. When
    blocks run out, the most recently admitted request loses its blocks and returns to the head of the queue: its
    tokens stay and are computed again. The oldest request can thus always take a step, so that all of them finish.

    Block 0 of the KV cache is reserved (the canary's scratch block) and never handed out, so that `num_blocks - 1`
    blocks hold requests.

    Args:
        eos_token_ids: tokens that end a sequence unless `ignore_eos`.

    Raises:
        InvalidRequest: there is no block to hand out.
    """

    _requests: dict[str, ActiveSequence]

    def __init__(self, limits: Limits, *, eos_token_ids: Collection[int], enable_prefix_caching: bool) -> None:
        super().__init__()
        if limits.num_blocks <= RESERVED_BLOCKS:
            raise InvalidRequest(
                f"The KV cache has {limits.num_blocks} blocks, of which {RESERVED_BLOCKS} is reserved: "
                "no request fits. Raise kv_cache_memory.",
                param="kv_cache_memory",
            )
        self._limits = limits
        self._pool = BlockPool(limits.num_blocks)
        self._block_size = limits.block_size
        self._prefix = PrefixCache(self._pool, block_size=limits.block_size, enabled=enable_prefix_caching)
        # The last token of a sequence is never computed, so it needs no place in the cache.
        self._max_length = min(limits.max_model_len, self._pool.num_usable * limits.block_size + 1)
        self._eos_token_ids = frozenset(eos_token_ids)
        self._waiting: deque[ActiveSequence] = deque()
        self._running: list[ActiveSequence] = []
        self._forget: list[str] = []
        self._num_resets = 0
        self._num_prefix_hits = 0
        self._step_tokens = Histogram(STEP_TOKEN_BOUNDS)
        self._preemptions = Histogram(PREEMPTION_BOUNDS)

    # --- requests in and out ---------------------------------------------------------------------

    def add(self, request: GenerateRequest) -> None:
        """Queue a request.

        Raises:
            InvalidRequest: the prompt is empty, or the id is in use.
            PromptTooLong: the prompt leaves no room for a single output token.
        """
        self.check(request)
        params, num_prompt = request.params, len(request.prompt_token_ids)
        limit = self._max_length if params.max_tokens is None else num_prompt + params.max_tokens
        sequence = ActiveSequence(
            request=request,
            token_ids=list(request.prompt_token_ids),
            hashes=HashChain(self._block_size),
            stop_token_ids=frozenset(params.stop_token_ids),
            max_length=min(limit, self._max_length),
            scored=params.prompt_logprobs is not None,
            max_chunk=sys.maxsize
            if params.prompt_logprobs is None
            else scored_per_step(params.prompt_logprobs, MAX_SCORED_CHUNK),
        )
        self._requests[request.request_id] = sequence
        self._waiting.insert(self._place_in_queue(params.priority), sequence)

    def _place_in_queue(self, priority: int) -> int:
        """Behind everything that is as urgent, and behind what was preempted: that has begun."""
        for place in range(len(self._waiting), 0, -1):
            before = self._waiting[place - 1]
            if before.request.params.priority <= priority or before.num_cached is not None:
                return place
        return 0

    def check(self, request: GenerateRequest) -> None:
        """Refuse what can never run; raises as `add` does, and changes nothing."""
        super().check(request)
        num_prompt = len(request.prompt_token_ids)
        if num_prompt == 0:
            raise InvalidRequest("The prompt must not be empty: it has no tokens.", param="prompt")
        if num_prompt >= self._max_length:
            raise PromptTooLong(
                f"The prompt has {num_prompt} tokens; this model's maximum context length is {self._max_length} "
                "tokens, of which at least one is needed for the output. Shorten the prompt, or raise max_model_len or "
                "kv_cache_memory.",
                param="prompt",
            )

    def preempt_all(self) -> int:
        """Send every running request back to the head of the queue, in order, and free all blocks.

        Nothing is lost: their tokens stay and are computed again. Returns how many requests were sent back.
        """
        count = len(self._running)
        while self._running:
            self._preempt(self._running.pop())
        return count

    def reset_prefix_cache(self) -> None:
        """Forget which block holds what. Running requests go on; what they began before is shared with nobody."""
        self._num_resets += 1
        self._pool.forget_all()

    def enter_epoch(self, epoch: Epoch) -> None:
        """If it is another one: preempt every request and forget all blocks, since memory holds something else now."""
        if epoch != self._epoch:
            super().enter_epoch(epoch)
            self._pool.forget_all()

    def readmit_all(self) -> None:
        """Tell the worker of every request again, with what was sampled for it so far."""
        super().readmit_all()
        for sequence in self._requests.values():
            if sequence.admitted:
                self._forget.append(sequence.request_id)
                sequence.admitted = False

    # --- a step ----------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """The next step; None if there is no request at all, or only such that wait for plans in flight.

        While there is a request and nothing is in flight, some request makes progress.
        """
        assert len(self._in_flight) < self._limits.max_in_flight, "schedule() before the oldest plan has come back"
        batch = self._open_batch()
        if self._schedule_running(batch):
            self._schedule_waiting(batch)
        if not batch.parts:
            return None
        plan = self._complete(
            StepPlan(
                chunks=tuple(part.chunk for part in batch.parts),
                admissions=tuple(batch.admissions),
                forget=tuple(self._forget),
                epoch=self._epoch,
            )
        )
        self._forget.clear()
        self._in_flight.append((plan, tuple(batch.parts)))
        return plan

    def _complete(self, plan: StepPlan) -> StepPlan:
        """The plan with all that a step needs."""
        return plan

    def _open_batch(self) -> Batch:
        """Of several plans in flight each takes its share of the batch, so that stages take turns at steps alike.

        A batch too small to be shared stays together: whoever came back first waits for the others.
        """
        limits = self._limits
        if limits.max_in_flight == 1:
            return Batch(budget=limits.max_num_batched_tokens, places=limits.max_num_seqs)
        num_shares = max(1, min(limits.max_in_flight, len(self._running) // MIN_STAGE_SEQUENCES))
        num_taken = sum(any(part.chunk.sample for part in parts) for _, parts in self._in_flight)
        places = -(-len(self._running) // num_shares) if num_taken < num_shares else 0
        return Batch(budget=min(limits.max_num_batched_tokens, places + MAX_STAGE_TOKENS), places=places)

    def _schedule_running(self, batch: Batch) -> bool:
        """Give running requests their share, oldest first; False if blocks ran out.

        A victim is always younger than the request it makes room for (or is that request), hence not in the plan yet:
        whatever a plan registers, its step computes.
        """
        num_running = len(self._running)
        index = 0
        while index < len(self._running) and batch.budget > 0:
            sequence = self._running[index]
            end = sequence.num_planned + min(sequence.num_missing, sequence.max_chunk, batch.budget)
            if end > sequence.num_planned and (batch.places > 0 or end < len(sequence.token_ids)):
                if not self._make_room(index, end):
                    return False
                if sequence.running:
                    self._append_chunk(batch, sequence, end)
            index += 1
        return len(self._running) == num_running

    def _make_room(self, index: int, end: int) -> bool:
        """Preempt until the running sequence of that index can grow to `end` tokens, itself last.

        False if those who have the blocks are in flight: nobody younger is scheduled then until they have come back.
        """
        sequence = self._running[index]
        while sequence.running and self._num_blocks_to_add(sequence, end) > self._pool.num_free:
            younger = [one for one in self._running[index + 1 :] if not one.is_in_flight]
            is_last = sequence is self._running[-1] and not sequence.is_in_flight
            if not younger and not is_last:
                return False
            victim = younger[-1] if younger else sequence
            self._running.remove(victim)
            self._preempt(victim)
        return True

    def _schedule_waiting(self, batch: Batch) -> None:
        # Digests of blocks begin with this: nothing from before the last reset, or of another epoch, has it.
        root = repr((self._epoch, self._num_resets)).encode()
        while self._waiting and batch.budget > 0 and len(self._running) < self._limits.max_num_seqs:
            sequence = self._waiting[0]
            salt = sequence.request.params.cache_salt
            sequence.hashes.restart(root if salt is None else root + salt.encode())
            # what the cache holds has no logits any more
            matched = () if sequence.to_be_scored else self._prefix.match(sequence.hashes, sequence.token_ids)
            if not self._has_room(sequence, matched):
                return
            self._admit(self._waiting.popleft(), matched, batch)
            end = sequence.num_planned + min(sequence.num_missing, sequence.max_chunk, batch.budget)
            self._append_chunk(batch, sequence, end)

    def _has_room(self, sequence: ActiveSequence, matched: tuple[int, ...]) -> bool:
        """Whether all known tokens fit, leaving a block to grow into for each running request.

        Asking for more than the first chunk avoids admitting what would be preempted soon. An idle engine has room for
        whatever `add` accepted, so nothing waits forever.
        """
        num_revived = sum(self._pool.is_free(block_id) for block_id in matched)
        num_new = self._num_blocks(len(sequence.token_ids)) - len(matched)
        return num_revived + num_new + len(self._running) <= self._pool.num_free

    def _admit(self, sequence: ActiveSequence, matched: tuple[int, ...], batch: Batch) -> None:
        for block_id in matched:
            self._pool.share(block_id)
        sequence.block_ids = matched
        sequence.num_computed = sequence.num_planned = len(matched) * self._block_size
        sequence.running = True
        sequence.epoch = self._epoch
        self._running.append(sequence)
        if not sequence.admitted:
            sequence.admitted = True
            prompt = sequence.request.prompt_token_ids
            outputs = tuple(sequence.token_ids[len(prompt) :])
            batch.admissions.append(Admission(sequence.request_id, sequence.request.params, prompt, outputs))
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed
            self._num_prompt_tokens += sequence.num_prompt
            self._num_prefix_hits += sequence.num_cached

    def _append_chunk(self, batch: Batch, sequence: ActiveSequence, end: int) -> None:
        """Plan tokens [num_planned, end): allocate their blocks and register those that the step will fill."""
        assert sequence.epoch == self._epoch, "the blocks of a sequence are those of another epoch"
        start = sequence.num_planned
        num_new = self._num_blocks_to_add(sequence, end)
        if num_new > 0:
            sequence.block_ids += tuple(self._pool.allocate() for _ in range(num_new))
        self._prefix.register(sequence.hashes, sequence.token_ids, block_ids=sequence.block_ids, start=start, end=end)
        chunk = Chunk(
            request_id=sequence.request_id,
            token_ids=tuple(sequence.token_ids[start:end]),
            start=start,
            block_ids=sequence.block_ids,
            sample=end == len(sequence.token_ids),
            scoring=sequence.scoring(start, end) if sequence.scored else None,
        )
        sequence.num_planned = end
        batch.parts.append(Part(sequence, chunk, sequence.stint))
        batch.budget -= end - start
        batch.places -= chunk.sample

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _num_blocks_to_add(self, sequence: ActiveSequence, end: int) -> int:
        return self._num_blocks(end) - len(sequence.block_ids)

    # --- its outcome -----------------------------------------------------------------------------

    def update(self, plan: StepPlan, result: StepResult) -> list[RequestDelta]:
        """Take the step's tokens; one delta per request that got one, in the order of the plan."""
        parts: tuple[Part, ...] = self._land(plan)
        if plan.epoch != self._epoch:
            return []
        sampled, scored = iter(result.sampled), iter(result.scored)
        deltas = []
        num_tokens = 0
        for part in parts:
            sequence, chunk = part.sequence, part.chunk
            scores = next(scored) if chunk.scoring is not None else ()
            token = next(sampled) if chunk.sample else None
            assert token is None or token.request_id == chunk.request_id, "results are not in the order of the plan"
            if not part.counts:
                continue
            sequence.num_computed = chunk.start + len(chunk.token_ids)
            if scores:
                sequence.num_scored += len(scores)
                deltas.append(RequestDelta(chunk.request_id, prompt_logprobs=scores))
            if token is not None:
                num_tokens += 1 if sequence.num_output else 1 + sequence.num_prompt
                deltas.append(self._advance(sequence, token))
        if num_tokens:
            self._step_tokens.observe(num_tokens)
        return deltas

    def fail_step(self, plan: StepPlan, error: ErrorInfo) -> list[RequestDelta]:
        """The step was not computed: end its requests with `error` and forget the blocks it was to fill."""
        self._forget_blocks(plan)
        parts: tuple[Part, ...] = self._land(plan)
        known = [part.request_id for part in parts if self._requests.get(part.request_id) is part.sequence]
        return self._end(known, error=error)

    def drop_step(self, plan: StepPlan) -> None:
        """The step was not computed, and its requests are to be computed again; what ended before it still has."""
        self._forget_blocks(plan)
        super().drop_step(plan)
        self._forget[:0] = plan.forget

    def _forget_blocks(self, plan: StepPlan) -> None:
        """Nobody finds the blocks that the plan was to fill."""
        for chunk in plan.chunks:
            end = chunk.start + len(chunk.token_ids)
            self._prefix.forget(block_ids=chunk.block_ids, start=chunk.start, end=end)

    def _advance(self, sequence: ActiveSequence, token: SampledToken) -> RequestDelta:
        is_first = sequence.num_output == 0
        sequence.token_ids.append(token.token_id)
        self._num_generation_tokens += 1
        reason = self._finish_reason(sequence, token.token_id)
        if reason is not None:
            self._remove(sequence)
        stopped_by_id = reason == "stop" and not self._is_eos(sequence, token.token_id)
        logprobs: tuple[TokenLogprobs, ...] = () if token.logprobs is None else (token.logprobs,)
        return RequestDelta(
            request_id=sequence.request_id,
            token_ids=(token.token_id,),
            logprobs=logprobs,
            finish_reason=reason,
            stop_token_id=token.token_id if stopped_by_id else None,
            num_cached_tokens=(sequence.num_cached or 0) if is_first else 0,
        )

    def _is_eos(self, sequence: ActiveSequence, token_id: int) -> bool:
        return token_id in self._eos_token_ids and (not sequence.request.params.ignore_eos or sequence.has_grammar)

    def _finish_reason(self, sequence: ActiveSequence, token_id: int) -> FinishReason | None:
        is_eos = self._is_eos(sequence, token_id)
        is_enough = sequence.num_output >= sequence.request.params.min_tokens
        if (is_eos or token_id in sequence.stop_token_ids) and (is_enough or (is_eos and sequence.has_grammar)):
            return "stop"
        return "length" if len(sequence.token_ids) >= sequence.max_length else None

    # --- leaving the batch -----------------------------------------------------------------------

    def _preempt(self, sequence: ActiveSequence) -> None:
        """Return a sequence, already taken out of `_running`, to the head of the queue without its blocks."""
        self._free(sequence)
        self._waiting.appendleft(sequence)
        sequence.num_preemptions += 1
        self._num_preemptions += 1

    def _free(self, sequence: ActiveSequence) -> None:
        self._pool.release(sequence.block_ids)
        sequence.block_ids = ()
        sequence.num_computed = sequence.num_planned = 0
        sequence.stint += 1
        sequence.running = False

    def _remove(self, active: ActiveSequence) -> None:
        super()._remove(active)
        self._preemptions.observe(active.num_preemptions)
        if active.running:
            self._running.remove(active)
            self._free(active)
        else:
            self._waiting.remove(active)
        if active.admitted:
            self._forget.append(active.request_id)

    # --- what can be seen ------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        """Requests that own blocks."""
        return len(self._running)

    def stats(self) -> SchedulerStats:
        """Gauges and counters; `num_blocks` leaves out the reserved block."""
        return replace(
            super().stats(),
            num_blocks=self._pool.num_usable,
            num_free_blocks=self._pool.num_free,
            num_prefix_queries_total=self._num_prompt_tokens,  # every prompt is looked up once
            num_prefix_hits_total=self._num_prefix_hits,
            step_tokens=self._step_tokens.counts,
            preemptions=self._preemptions.counts,
        )
