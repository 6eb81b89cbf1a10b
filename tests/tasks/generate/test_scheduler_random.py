"""Whatever is asked of the scheduler in whatever order, every request gets the tokens it would get alone.

A simulated worker keeps a real block store: the K/V of a token is a hash over the K/V before it, its own id and the
version of the weights, read through the block table the plan gave. So a block written by two owners, found by a wrong
hash, not computed, or computed with old weights changes a token, and the comparison with a plain model fails.

Up to three plans are in flight, which the worker executes in order, each when its outcome is asked for.
"""

from collections import Counter, deque
from hashlib import blake2b
from itertools import count
from unittest.mock import patch

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from shuteye.errors import ErrorInfo
from shuteye.tasks.generate import scheduler
from shuteye.tasks.generate.plans import SampledToken, StepPlan, StepResult
from shuteye.tasks.generate.requests import GenerateRequest, SamplingParams
from shuteye.tasks.generate.scheduler import Limits, Scheduler

VOCABULARY = 16
EOS = 0
OUTCOMES = ("done",) * 3 + ("failed", "aborted in flight", "preempted in flight")


def next_kv(before, token_id, version):
    return blake2b(before + bytes([token_id, version]), digest_size=8).digest()


def choose(kv):
    """The next token: eos about once in sixteen."""
    return EOS if kv[1] < 16 else 1 + kv[0] % (VOCABULARY - 1)


class Worker:
    """Executes plans over a block store; holds sampling state from admission to `forget`, as real workers do."""

    def __init__(self, *, num_blocks, block_size, version):
        self.block_size = block_size
        self.slots = [[b"unwritten"] * block_size for _ in range(num_blocks)]
        self.known = set()
        self.version = version
        self.was_told_anew = False  # some of what it is to forget may never have been admitted

    def read(self, chunk, position):
        block_id = chunk.block_ids[position // self.block_size]
        return self.slots[block_id][position % self.block_size]

    def take_over(self, plan):
        """The bookkeeping of a plan: forget, then admit; every chunk must be of a known request."""
        assert self.was_told_anew or self.known.issuperset(plan.forget)
        self.known.difference_update(plan.forget)
        admitted = {admission.request_id for admission in plan.admissions}
        assert self.known.isdisjoint(admitted)
        self.known |= admitted
        assert self.known.issuperset(chunk.request_id for chunk in plan.chunks)

    def fail(self, plan):
        """A step that raised half way: garbage in every slot it was to write."""
        self.take_over(plan)
        for chunk in plan.chunks:
            for position in range(chunk.start, chunk.start + len(chunk.token_ids)):
                self.slots[chunk.block_ids[position // self.block_size]][position % self.block_size] = b"garbage!"

    def execute(self, plan):
        self.take_over(plan)
        sampled = []
        for chunk in plan.chunks:
            kv = self.read(chunk, chunk.start - 1) if chunk.start else b""
            for position, token_id in enumerate(chunk.token_ids, chunk.start):
                kv = next_kv(kv, token_id, self.version)
                self.slots[chunk.block_ids[position // self.block_size]][position % self.block_size] = kv
            if chunk.sample:
                sampled.append(SampledToken(chunk.request_id, choose(kv)))
        return StepResult(tuple(sampled))


class Expected:
    """A request and what is known of its outcome. `comparable`: no weight change happened during its life."""

    def __init__(self, request, version):
        self.request = request
        self.version = version
        self.tokens = []
        self.comparable = True
        self.reason = None

    def alone(self, max_length):
        """Tokens and reason by the plain model: next token = f(all tokens so far)."""
        params, kv, tokens = self.request.params, b"", []
        for token_id in self.request.prompt_token_ids:
            kv = next_kv(kv, token_id, self.version)
        while True:
            tokens.append(choose(kv))
            if tokens[-1] == EOS and not params.ignore_eos and len(tokens) >= params.min_tokens:
                return tokens, "stop"
            if len(tokens) == params.max_tokens or len(self.request.prompt_token_ids) + len(tokens) == max_length:
                return tokens, "length"
            kv = next_kv(kv, tokens[-1], self.version)


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(2, 20),
        block_size=st.integers(1, 4),
        max_num_seqs=st.integers(1, 5),
        budget=st.integers(1, 20),
        caching=st.booleans(),
        weights=st.integers(0, 200),
        depth=st.integers(1, 3),
        share=st.integers(1, 3),
    )
    def start(self, *, num_blocks, block_size, max_num_seqs, budget, caching, weights, depth, share):
        self.shares = patch.object(scheduler, "MIN_STAGE_SEQUENCES", share)
        self.shares.start()
        self.max_length = min(30, (num_blocks - 1) * block_size + 1)
        limits = Limits(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=30,
            max_in_flight=depth,
        )
        self.scheduler = Scheduler(limits, eos_token_ids=(EOS,), enable_prefix_caching=caching)
        self.worker = Worker(num_blocks=num_blocks, block_size=block_size, version=weights)
        self.block_size, self.budget, self.max_num_seqs = block_size, budget, max_num_seqs
        self.live: dict[str, Expected] = {}
        self.depth = depth
        self.flying: deque[tuple[StepPlan, dict[str, Expected]]] = deque()

    # --- what a caller may do ---

    @rule(
        copies=st.integers(1, 3),
        kind=st.integers(0, 1),
        length=st.integers(1, 29),
        max_tokens=st.none() | st.integers(1, 20),
        ignore_eos=st.booleans(),
        min_tokens=st.integers(0, 20),
    )
    def add(self, *, copies, kind, length, max_tokens, ignore_eos, min_tokens):
        """Prompts are one of two, cut to a length, so that many share a prefix."""
        prompt = tuple((kind + 1 + i // 3) % VOCABULARY for i in range(min(length, self.max_length - 1)))
        min_tokens = min(min_tokens, max_tokens or 20)
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos, min_tokens=min_tokens)
        for _ in range(copies):
            # Ids are used again as soon as they are free
            request_id = next(name for name in map(str, count()) if name not in self.live)
            request = GenerateRequest(request_id, prompt, params)
            self.scheduler.add(request)
            self.live[request_id] = Expected(request, self.worker.version)

    @rule(outcome=st.sampled_from(OUTCOMES), data=st.data())
    def step(self, outcome, data):
        self.run_step(outcome, data)

    @rule(steps=st.integers(1, 20))
    def run(self, steps):
        for _ in range(steps):
            self.run_step("done")

    @rule(what=st.sampled_from(["abort", "preempt all", "change weights"]), data=st.data())
    def disturb(self, what, data):
        if what == "abort" and self.live:
            self.abort_some(data)
        elif what == "preempt all":
            running = self.scheduler.num_running
            assert self.scheduler.preempt_all() == running
            assert self.scheduler.stats().num_free_blocks == self.scheduler.stats().num_blocks
        elif what == "change weights":
            self.change_weights()

    # --- how it is carried out ---

    def change_weights(self):
        """Requests under way go on with mixed K/V, so their tokens are their own affair; nobody else may see it."""
        self.worker.version += 1
        self.scheduler.reset_prefix_cache()
        for expected in self.live.values():
            expected.comparable = False

    def abort_some(self, data):
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.live)), unique=True))
        deltas = self.scheduler.abort([*chosen, "nobody"])
        assert [(d.request_id, d.finish_reason) for d in deltas] == [(name, "abort") for name in chosen]
        for name in chosen:
            del self.live[name]

    def post(self):
        """Schedule one more plan; whether there was any."""
        before = [part for _, parts in self.scheduler._in_flight for part in parts if part.counts]
        plan = self.scheduler.schedule()
        assert all(part.counts for part in before), "preempted in flight: its sampler is a token ahead"
        assert plan is not None or self.flying or not self.live, "requests exist, but nothing is scheduled"
        if plan is None:
            return False
        self.check_plan(plan)
        self.check_beside_others()
        self.flying.append((plan, {chunk.request_id: self.live[chunk.request_id] for chunk in plan.chunks}))
        return True

    def fail(self, plan, meant):
        """The step fails; those behind it, of which the first ones had begun, are computed again."""
        self.worker.fail(plan)
        deltas = self.scheduler.fail_step(plan, ErrorInfo("InternalError", "boom"))
        assert [d.request_id for d in deltas] == [name for name, one in meant.items() if self.live.get(name) is one]
        for delta in deltas:
            del self.live[delta.request_id]
        if not self.flying:
            return
        num_begun = len(self.live) % (1 + len(self.flying))
        for number, (behind, _) in enumerate(self.flying):
            if number < num_begun:
                self.worker.fail(behind)
            self.scheduler.drop_step(behind)
        self.flying.clear()
        self.scheduler.readmit_all()
        self.worker.was_told_anew = True

    def run_step(self, outcome, data=None):
        while len(self.flying) < self.depth and self.post():
            pass
        if not self.flying:
            return
        plan, meant = self.flying.popleft()
        if outcome == "failed":
            self.fail(plan, meant)
            return
        result = self.worker.execute(plan)
        if outcome == "aborted in flight" and self.live:
            self.abort_some(data)
        elif outcome == "preempted in flight":
            self.scheduler.preempt_all()
        self.receive(self.scheduler.update(plan, result))

    def receive(self, deltas):
        for delta in deltas:
            expected = self.live[delta.request_id]
            expected.tokens += delta.token_ids
            if delta.finished:
                del self.live[delta.request_id]
                if expected.comparable:
                    assert (expected.tokens, delta.finish_reason) == expected.alone(self.max_length)

    # --- what must hold ---

    def check_plan(self, plan):
        assert 0 < plan.num_tokens <= self.budget
        assert len(plan.chunks) <= self.max_num_seqs
        ids = [chunk.request_id for chunk in plan.chunks]
        assert len(set(ids)) == len(ids)
        for chunk in plan.chunks:
            expected = self.live[chunk.request_id]
            known = [*expected.request.prompt_token_ids, *expected.tokens]
            end = chunk.start + len(chunk.token_ids)
            assert list(chunk.token_ids) == known[chunk.start : end]
            assert chunk.token_ids
            assert chunk.sample == (end == len(known))
            assert len(chunk.block_ids) == -(-end // self.block_size)
            assert 0 not in chunk.block_ids

    def check_beside_others(self):
        """Of what is in flight: no two plans write one slot, and none has a sequence whose token is not known yet."""
        written, sampled = set(), set()
        for part in (part for _, parts in self.scheduler._in_flight for part in parts if part.counts):
            chunk = part.chunk
            assert chunk.request_id not in sampled
            sampled |= {chunk.request_id} if chunk.sample else set()
            for position in range(chunk.start, chunk.start + len(chunk.token_ids)):
                slot = chunk.block_ids[position // self.block_size], position % self.block_size
                assert slot not in written
                written.add(slot)

    @invariant()
    def blocks_are_owned_exactly(self):
        running = self.scheduler._running
        owners = Counter(block_id for sequence in running for block_id in sequence.block_ids)
        pool = self.scheduler._pool
        assert all(pool.reference_count(b) == owners[b] for b in range(len(self.worker.slots)))
        assert pool.num_free == pool.num_usable - len(owners)
        content = {}
        for sequence in running:
            assert len(set(sequence.block_ids)) == len(sequence.block_ids)
            for index, block_id in enumerate(sequence.block_ids):
                # Shared means: the same full block of the same prefix
                end = (index + 1) * self.block_size
                prefix = tuple(sequence.token_ids[:end])
                assert owners[block_id] == 1 or len(prefix) == end
                assert content.setdefault(block_id, prefix) == prefix

    @invariant()
    def nobody_is_lost(self):
        assert self.scheduler.num_running + self.scheduler.num_waiting == len(self.live)
        assert self.scheduler.has_unfinished == bool(self.live)

    def teardown(self):
        """Drain. The oldest request advances at every step and is never preempted, which bounds the steps."""
        if not hasattr(self, "scheduler"):
            return
        self.shares.stop()
        bound = self.depth * (1 + sum(self.max_length for _ in self.live))
        steps = 0
        while self.live or self.flying:
            self.run_step("done")
            self.blocks_are_owned_exactly()
            steps += 1
            assert steps <= bound, "livelock"
        stats = self.scheduler.stats()
        assert stats.num_free_blocks == stats.num_blocks
        assert self.scheduler.schedule() is None


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
