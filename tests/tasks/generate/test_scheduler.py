"""Scheduler, one rule at a time; test_scheduler_random.py holds what must be true of any history."""

from dataclasses import replace

import pytest

from shuteye.errors import ErrorInfo, InvalidRequest, PromptTooLong
from shuteye.state import PREEMPTION_BOUNDS, STEP_TOKEN_BOUNDS
from shuteye.tasks.generate.plans import SampledToken, StepResult
from shuteye.tasks.generate.requests import GenerateRequest, SamplingParams, TokenLogprobs
from shuteye.tasks.generate.scheduler import Limits, Scheduler

EOS = 99


def make_scheduler(**changes):
    settings = {"eos_token_ids": (EOS,), "enable_prefix_caching": True}
    settings |= {name: changes.pop(name) for name in settings if name in changes}
    limits = Limits(num_blocks=65, block_size=4, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=100)
    return Scheduler(replace(limits, **changes), **settings)


def request(request_id, prompt, **params):
    return GenerateRequest(request_id, tuple(prompt), SamplingParams(**params))


def step(scheduler, token_id=7, *, logprobs=None):
    """One step in which every sampling chunk gets `token_id` (or the id's own token from a dict)."""
    plan = scheduler.schedule()
    sampled = tuple(
        SampledToken(c.request_id, token_id[c.request_id] if isinstance(token_id, dict) else token_id, logprobs)
        for c in plan.chunks
        if c.sample
    )
    return plan, scheduler.update(plan, StepResult(sampled))


def run_one(scheduler, tokens):
    """Feed `tokens` to the only request until it finishes; its deltas."""
    deltas = []
    for token_id in tokens:
        deltas += step(scheduler, token_id)[1]
        if not scheduler.has_unfinished:
            break
    return deltas


def lengths(plan):
    return {chunk.request_id: len(chunk.token_ids) for chunk in plan.chunks}


class TestRefusals:
    @pytest.mark.parametrize("length", [100, 500])
    def test_prompt_without_room_for_output_is_refused(self, length):
        """It would wait forever, or be computed for nothing."""
        scheduler = make_scheduler()
        with pytest.raises(PromptTooLong, match=f"{length} tokens.*100") as caught:
            scheduler.add(request("a", range(length)))
        assert caught.value.param == "prompt"
        assert not scheduler.has_unfinished

    def test_prompt_that_needs_more_blocks_than_exist_is_refused(self):
        """It would wait forever for blocks, and everything behind it too."""
        scheduler = make_scheduler(num_blocks=4)  # 3 usable: 12 tokens computed, a 13th sampled
        scheduler.add(request("fits", range(12)))
        with pytest.raises(PromptTooLong):
            scheduler.add(request("a", range(13)))

    def test_empty_prompt_is_refused(self):
        """A chunk without tokens has no logits."""
        with pytest.raises(InvalidRequest, match="no tokens"):
            make_scheduler().add(request("a", []))

    def test_id_in_use_is_refused_and_free_again_afterwards(self):
        """Two requests would write one sampling state; or an id could never be used again."""
        scheduler = make_scheduler()
        scheduler.add(request("a", [1]))
        with pytest.raises(InvalidRequest, match="in use"):
            scheduler.add(request("a", [2]))
        scheduler.abort(["a"])
        scheduler.add(request("a", [2]))

    def test_pool_of_the_reserved_block_alone_is_refused(self):
        """Every request would be refused as too long."""
        with pytest.raises(InvalidRequest, match="reserved"):
            make_scheduler(num_blocks=1)


class TestBudget:
    def test_long_prompt_is_computed_in_chunks_and_sampled_once(self):
        """A prompt over the budget would overflow the batch, or be sampled from in its middle."""
        scheduler = make_scheduler(max_num_batched_tokens=10)
        scheduler.add(request("a", range(25)))
        plans = [step(scheduler)[0] for _ in range(4)]
        chunks = [plan.chunks[0] for plan in plans]
        assert [(c.start, len(c.token_ids), c.sample) for c in chunks] == [
            (0, 10, False),
            (10, 10, False),
            (20, 5, True),
            (25, 1, True),
        ]
        assert sum((c.token_ids for c in chunks), ()) == (*range(25), 7)
        assert [len(c.block_ids) for c in chunks] == [3, 5, 7, 7]
        assert chunks[2].block_ids[:5] == chunks[1].block_ids

    def test_running_requests_come_before_new_prompts(self):
        """A stream would stall while a long prompt is read."""
        scheduler = make_scheduler(max_num_batched_tokens=10)
        scheduler.add(request("old", [1, 2]))
        step(scheduler)
        scheduler.add(request("new", range(30)))
        plans = [step(scheduler)[0] for _ in range(4)]
        assert [lengths(plan) for plan in plans] == [{"old": 1, "new": 9}] * 3 + [{"old": 1, "new": 3}]

    def test_waiting_requests_are_admitted_in_order_of_arrival(self):
        """Short prompts would overtake long ones for ever."""
        scheduler = make_scheduler(max_num_batched_tokens=8, enable_prefix_caching=False)
        for name in "abc":
            scheduler.add(request(name, range(5)))
        plans = [step(scheduler)[0] for _ in range(3)]
        assert [lengths(plan) for plan in plans] == [
            {"a": 5, "b": 3},
            {"a": 1, "b": 2, "c": 5},
            {"a": 1, "b": 1, "c": 1},
        ]

    def test_batch_has_at_most_max_num_seqs(self):
        """The worker's buffers are sized by it."""
        scheduler = make_scheduler(max_num_seqs=2)
        for name in "abc":
            scheduler.add(request(name, [1]))
        plan, _ = step(scheduler)
        assert list(lengths(plan)) == ["a", "b"]
        assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)

    def test_nothing_to_do_is_none(self):
        """An idle engine would execute empty steps."""
        assert make_scheduler().schedule() is None


class TestFinish:
    def test_eos_ends_with_stop_and_no_stop_token(self):
        """vLLM's stop_reason is None for eos; its token is still reported."""
        scheduler = make_scheduler()
        scheduler.add(request("a", [1]))
        last = run_one(scheduler, [5, EOS, 5])[-1]
        assert (last.token_ids, last.finish_reason, last.stop_token_id) == ((EOS,), "stop", None)

    def test_stop_token_ends_with_stop_and_says_which(self):
        """A client cannot tell which of its stop tokens ended the text."""
        scheduler = make_scheduler()
        scheduler.add(request("a", [1], stop_token_ids=[5, 6]))
        last = run_one(scheduler, [4, 6, 4])[-1]
        assert (last.finish_reason, last.stop_token_id) == ("stop", 6)

    def test_ignore_eos_goes_on_but_a_stop_token_still_counts(self):
        """Benchmarks with ignore_eos would stop early; an eos given as stop token would be ignored."""
        scheduler = make_scheduler()
        scheduler.add(request("a", [1], ignore_eos=True, max_tokens=3))
        assert [d.finish_reason for d in run_one(scheduler, [EOS] * 9)] == [None, None, "length"]
        scheduler.add(request("b", [1], ignore_eos=True, stop_token_ids=[EOS]))
        assert [(d.finish_reason, d.stop_token_id) for d in run_one(scheduler, [EOS] * 9)] == [("stop", EOS)]

    @pytest.mark.parametrize("params", [{}, {"stop_token_ids": [5]}])
    def test_nothing_stops_before_min_tokens(self, params):
        """min_tokens would depend on the sampler's mask alone."""
        scheduler = make_scheduler()
        scheduler.add(request("a", [1], min_tokens=3, **params))
        token_id = 5 if params else EOS
        assert [d.finish_reason for d in run_one(scheduler, [token_id] * 9)] == [None, None, "stop"]

    def test_max_tokens_ends_with_length(self):
        """Off by one in the number of tokens."""
        scheduler = make_scheduler()
        scheduler.add(request("a", [1, 2], max_tokens=4))
        assert [d.finish_reason for d in run_one(scheduler, [5] * 9)] == [None, None, None, "length"]

    @pytest.mark.parametrize("max_tokens", [None, 1000])
    def test_full_context_ends_with_length(self, max_tokens):
        """Positions past the context would be computed; min_tokens must not prevent the end."""
        scheduler = make_scheduler(max_model_len=10)
        scheduler.add(request("a", range(4), max_tokens=max_tokens, min_tokens=50))
        deltas = run_one(scheduler, [5] * 50)
        assert len(deltas) == 6
        assert deltas[-1].finish_reason == "length"

    def test_context_is_also_bounded_by_the_blocks(self):
        """A lone request that outgrows the pool would preempt itself for ever."""
        scheduler = make_scheduler(num_blocks=4)
        scheduler.add(request("a", range(4), max_tokens=None))
        deltas = run_one(scheduler, [5] * 50)
        assert len(deltas) == 13 - 4
        assert deltas[-1].finish_reason == "length"
        assert scheduler.stats().num_preemptions_total == 0

    def test_logprobs_travel_with_their_token(self):
        """Logprobs would be lost between sampler and client."""
        scheduler = make_scheduler()
        scheduler.add(request("a", [1], logprobs=1))
        logprobs = TokenLogprobs((7,), (-0.5,), (1,))
        assert step(scheduler, logprobs=logprobs)[1][0].logprobs == (logprobs,)

    def test_end_frees_all_blocks(self):
        """Blocks would leak with every finished request."""
        scheduler = make_scheduler()
        for index in range(5):
            scheduler.add(request(str(index), range(9), max_tokens=3))
        while scheduler.has_unfinished:
            step(scheduler)
        assert scheduler.stats().num_free_blocks == scheduler.stats().num_blocks == 64


class TestWorkerState:
    def test_admission_comes_once_even_after_preemption(self):
        """The sampler's state (seed, penalties) would be reset in the middle of a sequence."""
        scheduler = make_scheduler()
        scheduler.add(request("a", [1, 2], seed=3))
        first, _ = step(scheduler)
        assert [a.request_id for a in first.admissions] == ["a"]
        assert first.admissions[0].params.seed == 3
        assert scheduler.preempt_all() == 1
        again, _ = step(scheduler)
        assert again.admissions == ()
        assert again.chunks[0].token_ids == (1, 2, 7)

    def test_forget_waits_for_the_next_plan(self):
        """The sampling state of finished requests would pile up in the workers."""
        scheduler = make_scheduler()
        scheduler.add(request("a", [1], max_tokens=1))
        scheduler.add(request("b", [1]))
        scheduler.add(request("c", [1]))
        step(scheduler)
        scheduler.abort(["b", "c"])
        assert scheduler.schedule() is None
        scheduler.add(request("d", [1]))
        assert step(scheduler)[0].forget == ("a", "b", "c")
        assert step(scheduler)[0].forget == ()

    def test_request_no_worker_knows_is_not_forgotten(self):
        """A request aborted while waiting would be named to workers that never saw it."""
        scheduler = make_scheduler()
        scheduler.add(request("a", [1]))
        scheduler.abort(["a"])
        scheduler.add(request("b", [1]))
        assert step(scheduler)[0].forget == ()

    def test_id_used_again_is_forgotten_and_admitted_in_one_plan(self):
        """The new request would inherit the old one's sampling state; workers forget before they admit."""
        scheduler = make_scheduler()
        scheduler.add(request("a", [1], max_tokens=1))
        step(scheduler)
        scheduler.add(request("a", [2]))
        plan, _ = step(scheduler)
        assert plan.forget == ("a",)
        assert plan.admissions[0].prompt_token_ids == (2,)


class TestPrefix:
    def test_second_request_hits_and_says_so_in_its_first_delta_only(self):
        """usage.prompt_tokens_details.cached_tokens would be wrong."""
        scheduler = make_scheduler()
        scheduler.add(request("a", range(10), max_tokens=1))
        assert step(scheduler)[1][0].num_cached_tokens == 0
        scheduler.add(request("b", range(10), max_tokens=2))
        plan, deltas = step(scheduler)
        assert (plan.chunks[0].start, plan.chunks[0].token_ids) == (8, (8, 9))
        assert deltas[0].num_cached_tokens == 8
        assert step(scheduler)[1][0].num_cached_tokens == 0
        stats = scheduler.stats()
        assert (stats.num_prefix_queries_total, stats.num_prefix_hits_total) == (20, 8)

    def test_requests_of_one_step_share_what_that_step_computes(self):
        """n completions of one prompt would each compute it."""
        scheduler = make_scheduler()
        for name in "ab":
            scheduler.add(request(name, range(10)))
        plan, _ = step(scheduler)
        first, second = plan.chunks
        assert (first.start, second.start) == (0, 8)
        assert first.block_ids[:2] == second.block_ids[:2]
        assert first.block_ids[2] != second.block_ids[2]

    def test_output_tokens_are_cached_too(self):
        """The next turn of a chat would recompute the last answer."""
        scheduler = make_scheduler()
        scheduler.add(request("a", [1, 2], max_tokens=7))
        run_one(scheduler, [7] * 7)
        scheduler.add(request("b", [1, 2, *[7] * 7]))
        assert step(scheduler)[0].chunks[0].start == 8

    def test_only_requests_of_one_salt_share(self):
        """A caller who learns by timing what somebody else has sent."""
        scheduler = make_scheduler()
        for name, salt, start in (("a", "x", 0), ("b", "y", 0), ("c", None, 0), ("d", "x", 8)):
            scheduler.add(request(name, range(10), max_tokens=1, cache_salt=salt))
            assert step(scheduler)[0].chunks[0].start == start

    def test_reset_forgets_what_was_cached(self):
        """After a weight update, a new request would be served K/V of the old weights."""
        scheduler = make_scheduler()
        scheduler.add(request("old", range(10), max_tokens=1))
        step(scheduler)
        scheduler.reset_prefix_cache()
        scheduler.add(request("new", range(10)))
        assert step(scheduler)[0].chunks[0].start == 0

    def test_request_running_through_a_reset_shares_nothing_afterwards(self):
        """Its later blocks build on K/V of the old weights; they would be found once someone recomputed the first."""
        scheduler = make_scheduler()
        scheduler.add(request("old", range(10), max_tokens=50))
        step(scheduler)
        scheduler.reset_prefix_cache()
        for _ in range(10):
            step(scheduler)
        for name in "ab":
            scheduler.add(request(name, [*range(10), *[7] * 10]))
        tables = {chunk.request_id: set(chunk.block_ids) for chunk in step(scheduler)[0].chunks}
        assert tables["a"] & tables["b"]
        assert not tables["old"] & (tables["a"] | tables["b"])

    def test_after_preemption_a_request_may_share_again(self):
        """One reset would switch prefix caching off for the life of a long request."""
        scheduler = make_scheduler()
        scheduler.add(request("old", range(10), max_tokens=50))
        step(scheduler)
        scheduler.reset_prefix_cache()
        scheduler.preempt_all()
        step(scheduler)
        scheduler.add(request("new", range(10)))
        assert {c.request_id: c.start for c in step(scheduler)[0].chunks}["new"] == 8


class TestPreemption:
    def test_the_most_recently_admitted_yields_and_finishes_later(self):
        """The oldest request would lose its work, and two could preempt each other for ever."""
        scheduler = make_scheduler(num_blocks=7, enable_prefix_caching=False)  # 24 tokens for two that want 20 each
        for name in "ab":
            scheduler.add(request(name, range(6), max_tokens=14))
        finished = []
        while scheduler.has_unfinished:
            finished += [d.request_id for d in step(scheduler)[1] if d.finished]
        assert finished == ["a", "b"]
        stats = scheduler.stats()
        assert stats.num_preemptions_total == 1
        assert (stats.preemptions.counts[:3], stats.preemptions.total) == ((1, 1, 0), 1)

    def test_preempt_all_keeps_order_and_tokens(self):
        """mode=keep would reorder requests, or lose tokens that were already streamed."""
        scheduler = make_scheduler(max_num_seqs=2)
        for name in "abc":
            scheduler.add(request(name, [ord(name)]))
        step(scheduler, {"a": 5, "b": 6})
        assert scheduler.preempt_all() == 2
        assert (scheduler.num_running, scheduler.num_waiting) == (0, 3)
        assert scheduler.stats().num_free_blocks == 64
        plan, _ = step(scheduler)
        assert [(c.request_id, c.token_ids) for c in plan.chunks] == [("a", (97, 5)), ("b", (98, 6))]

    def test_outcome_for_a_request_preempted_in_flight_is_dropped(self):
        """Its token would be appended although its K/V is gone, or counted twice."""
        scheduler = make_scheduler()
        scheduler.add(request("a", [1]))
        plan = scheduler.schedule()
        scheduler.preempt_all()
        assert scheduler.update(plan, StepResult((SampledToken("a", 5),))) == []
        assert step(scheduler)[0].chunks[0].token_ids == (1,)


class TestAbortAndFailure:
    def test_abort_frees_at_once_and_ignores_strangers_and_repeats(self):
        """A disconnected client would hold its blocks; aborting twice would raise."""
        scheduler = make_scheduler()
        for name in "ab":
            scheduler.add(request(name, range(9)))
        step(scheduler)
        deltas = scheduler.abort(["a", "nobody", "a"])
        assert [(d.request_id, d.finish_reason) for d in deltas] == [("a", "abort")]
        assert scheduler.abort(["a"]) == []
        scheduler.abort_all()
        assert scheduler.stats().num_free_blocks == 64
        assert not scheduler.has_unfinished

    def test_abort_in_flight_drops_the_outcome(self):
        """A result for a request that is gone would raise in the engine's loop."""
        scheduler = make_scheduler()
        for name in "ab":
            scheduler.add(request(name, [1]))
        plan = scheduler.schedule()
        scheduler.abort(["a"])
        deltas = scheduler.update(plan, StepResult((SampledToken("a", 5), SampledToken("b", 6))))
        assert [(d.request_id, d.token_ids) for d in deltas] == [("b", (6,))]

    def test_failed_step_ends_its_requests_and_forgets_what_it_was_to_fill(self):
        """K/V that was never computed would be found by the next request with that prompt."""
        scheduler = make_scheduler(max_num_seqs=2)
        for name in "abc":
            scheduler.add(request(name, range(10)))
        plan = scheduler.schedule()
        error = ErrorInfo("InternalError", "boom")
        deltas = scheduler.fail_step(plan, error)
        assert [(d.request_id, d.error) for d in deltas] == [("a", error), ("b", error)]
        assert scheduler.stats().num_free_blocks == 64
        plan, _ = step(scheduler)
        assert plan.forget == ("a", "b")
        assert [(c.request_id, c.start) for c in plan.chunks] == [("c", 0)]

    def test_failed_step_keeps_what_was_computed_before_it(self):
        """One failure would empty the whole prefix cache."""
        scheduler = make_scheduler()
        scheduler.add(request("a", range(10)))
        step(scheduler)
        scheduler.fail_step(scheduler.schedule(), ErrorInfo("InternalError", "boom"))
        scheduler.add(request("b", range(10)))
        assert step(scheduler)[0].chunks[0].start == 8

    def test_second_plan_before_the_first_landed_is_our_bug(self):
        """Tokens would be computed twice."""
        scheduler = make_scheduler()
        scheduler.add(request("a", [1]))
        scheduler.schedule()
        with pytest.raises(AssertionError, match="oldest plan"):
            scheduler.schedule()


def test_decode_step_does_not_touch_the_tokens_before():
    """Slicing or hashing whole sequences makes each decode step cost as much as the context is long."""

    class Watched(list):
        def __getitem__(self, key):
            assert not isinstance(key, slice) or key.stop - key.start <= 4, f"sliced {key}"
            return super().__getitem__(key)

        def __iter__(self):
            raise AssertionError("iterated over all tokens")

    scheduler = make_scheduler(max_model_len=200, max_num_batched_tokens=128)
    scheduler.add(request("a", range(100), max_tokens=50))
    step(scheduler)
    sequence = scheduler._requests["a"]
    sequence.token_ids = Watched(sequence.token_ids)
    for _ in range(20):
        plan, _ = step(scheduler)
        assert plan.num_tokens == 1


def test_urgent_requests_leave_the_queue_first():
    """`priority` ignored; or equals out of order."""
    scheduler = make_scheduler(max_num_seqs=1)
    for name, priority in (("a", 0), ("b", 5), ("c", 0), ("d", -1), ("e", 5)):
        scheduler.add(request(name, (1, 2), max_tokens=1, priority=priority))
    order = []
    while scheduler.has_unfinished:
        plan, _deltas = step(scheduler)
        order += [chunk.request_id for chunk in plan.chunks]
    assert order == ["d", "a", "c", "b", "e"]


class TestCounters:
    def test_tokens_of_steps_are_those_sampled_and_prompts_with_their_first(self):
        """Sums that differ from vLLM's: a prompt counted for each of its chunks, or again after a preemption."""
        scheduler = make_scheduler(max_num_batched_tokens=8)
        scheduler.add(request("a", range(12), max_tokens=3))
        step(scheduler)
        assert scheduler.stats().step_tokens.total == 0
        step(scheduler)
        scheduler.preempt_all()
        while scheduler.has_unfinished:
            step(scheduler)
        found = scheduler.stats().step_tokens
        assert found.total == 12 + 3
        bounds = dict(zip(STEP_TOKEN_BOUNDS, found.counts, strict=False))
        assert (bounds[1], bounds[16], sum(found.counts)) == (2, 1, 3)

    def test_requests_that_were_ended_are_counted_too(self):
        """A histogram of preemptions that leaves out those who waited in vain."""
        scheduler = make_scheduler()
        scheduler.add(request("a", range(4)))
        step(scheduler)
        scheduler.preempt_all()
        step(scheduler)
        scheduler.preempt_all()
        scheduler.abort(["a"])
        found = scheduler.stats().preemptions
        assert (found.counts[PREEMPTION_BOUNDS.index(2)], found.total) == (1, 2)
