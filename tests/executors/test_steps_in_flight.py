"""A pipeline with a step for each stage in flight: the tokens of one rank alone, whatever happens meanwhile.

`tasks/generate/test_scheduler_random.py` has what must be true of any plans in flight.
"""

from __future__ import annotations

import itertools
import math
import signal
import time
from dataclasses import replace

import pytest
from core_harness import CORE_OPTIONS, CoreHarness

from shuteye import EngineConfig
from shuteye.calls import PauseCall, ResumeCall, SleepCall, UpdateFromFileCall, WakeCall
from shuteye.engine.core import EngineCore
from shuteye.errors import BackendFailure, GroupAborted, InvalidRequest, RankLost, ShuteyeError
from shuteye.executors import multiproc
from shuteye.executors.inproc import InprocExecutor
from shuteye.tasks.generate import scheduler
from shuteye.tasks.generate.requests import SamplingParams
from shuteye.testing import tiny_model

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
DRAWN = SamplingParams(temperature=1.0, seed=3, max_tokens=20, ignore_eos=True, repetition_penalty=1.3)
LENGTHS = (3, 5, 17, 40, 64, 2, 90, 33, 21, 8)
BLOCK_BYTES = 16 * 2 * 2 * 2 * 16 * 4
"""Of the tiny model: 16 tokens, 2 layers, K and V, 2 heads of 16 numbers of float32."""
SOON_S = 10.0
names = itertools.count()


@pytest.fixture(autouse=True)
def small_shares(monkeypatch):
    """Ten requests are too few to be worth several steps."""
    monkeypatch.setattr(scheduler, "MIN_STAGE_SEQUENCES", 2)


def prompt_of(length, salt=0):
    return tuple(3 + (salt + 7 * at + at * at) % 300 for at in range(length))


@pytest.fixture(scope="module")
def shared(open_ranks):
    return open_ranks("PP 2", max_num_batched_tokens=32)


@pytest.fixture
def ranks(shared):
    """Two stages, awake; a prompt of more than 32 tokens is computed in chunks."""
    yield shared
    if shared.core.state.paused:
        shared.call(ResumeCall())
    shared.wake()
    shared.run()


@pytest.fixture(scope="module")
def expected(tiny_checkpoint, core_cache):
    """The tokens that one rank gives for a prompt alone."""
    config = EngineConfig(**{"model": str(tiny_checkpoint), **CORE_OPTIONS, "cache_dir": core_cache})
    executor = InprocExecutor(config)
    harness, known = CoreHarness(EngineCore(config, executor), None), {}

    def tokens(prompt, params=GREEDY):
        key = prompt, repr(params)
        if key not in known:
            known[key] = harness.generate(prompt, params)
        return known[key]

    yield tokens
    executor.close()


class Crowd:
    """Requests of many lengths at once, greedy and drawn; checked against what each gives alone."""

    def __init__(self, ranks, lengths=LENGTHS, *, salt=0):
        self.ranks = ranks
        self.asked = {}
        for number, length in enumerate(lengths):
            name = f"crowd-{next(names)}"
            self.asked[name] = prompt_of(length, salt), DRAWN if number % 3 == 2 else GREEDY
            ranks.add(name, *self.asked[name])

    def step_until_in_flight(self):
        """Step until tokens come, with a step under way that has not been asked for."""
        for _ in range(200):
            self.ranks.step()
            if self.ranks.core._in_flight and any(self.ranks.tokens[name] for name in self.asked):
                return
        raise AssertionError("there is never more than one step in flight")

    def check(self, expected, *, without=()):
        """Every request has ended with the right tokens, but those."""
        for name, asked in self.asked.items():
            if name not in without:
                assert (name, self.ranks.ended[name]) == (name, "length")
                assert (name, self.ranks.tokens[name]) == (name, expected(*asked))


# --- the tokens -------------------------------------------------------------------------------------


def test_many_requests_at_once_give_what_each_gives_alone(ranks, expected):
    """Would catch an answer of a fast stage that is dropped, and a sequence in two steps at a time."""
    crowd = Crowd(ranks)
    crowd.step_until_in_flight()
    sizes = []
    while ranks.core.can_step:
        ranks.step()
        sizes.append(len(ranks.core._in_flight))
    crowd.check(expected)
    assert max(sizes) == ranks.executor.max_in_flight - 1 == 1
    assert ranks.core.stats.num_free_blocks == ranks.core.stats.num_blocks


def test_chunks_of_a_long_prompt_are_in_flight_together(ranks, expected, monkeypatch):
    """Would catch a pipeline that computes a prompt on one stage at a time."""
    posted, post = [], ranks.executor.post
    monkeypatch.setattr(ranks.executor, "post", lambda plan: posted.append(len(ranks.core._in_flight)) or post(plan))
    prompt = prompt_of(150, salt=9)
    assert ranks.generate(prompt, GREEDY) == expected(prompt)
    assert posted[:5] == [0, 1, 1, 1, 1]
    assert set(posted[6:]) == {0}, "the one sequence was planned before its token was known"


def test_a_prompt_that_was_just_posted_is_shared(ranks, expected):
    """Would catch blocks that are found before they are computed."""
    begin = ranks.core.stats.num_prefix_hits_total
    crowd = Crowd(ranks, [81] * 6, salt=40)
    ranks.run()
    crowd.check(expected)
    assert ranks.core.stats.num_prefix_hits_total - begin >= 4 * 64


def test_requests_end_and_are_aborted_with_steps_in_flight(ranks, expected):
    """Would catch tokens of a request that has ended, or blocks of it that another step still writes."""
    crowd = Crowd(ranks, salt=1)
    crowd.step_until_in_flight()
    gone = [name for number, name in enumerate(crowd.asked) if number % 4 == 1]
    ranks.core.abort(gone)
    others = Crowd(ranks, (30, 4, 12), salt=2)  # take the blocks that have just become free
    stop = expected(prompt_of(9, 5))[4]
    ranks.add(name := f"stops-{next(names)}", prompt_of(9, 5), replace(GREEDY, stop_token_ids=[stop]))
    ranks.run()
    crowd.check(expected, without=gone)
    others.check(expected)
    assert all(ranks.ended[name] == "abort" for name in gone)
    assert ranks.ended[name] == "stop"
    tokens = expected(prompt_of(9, 5))
    assert ranks.tokens[name] == tokens[: tokens.index(stop) + 1]


# --- control calls ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["keep", "wait", "abort"])
def test_a_sleep_finds_no_step_in_flight(ranks, expected, mode):
    """Would catch memory that is given back under a stage that still computes, and tokens of the epoch before."""
    crowd = Crowd(ranks, salt=4)
    crowd.step_until_in_flight()
    assert ranks.call(SleepCall(1, mode=mode)).freed_bytes > 0
    assert not ranks.core._in_flight
    ranks.call(WakeCall())
    ranks.run()
    if mode == "abort":
        assert {ranks.ended[name] for name in crowd.asked} <= {"abort", "length"}
    else:
        crowd.check(expected)


def test_other_calls_find_no_step_in_flight(ranks, expected):
    crowd = Crowd(ranks, salt=5)
    crowd.step_until_in_flight()
    ranks.call(PauseCall(mode="keep"))
    assert not ranks.core._in_flight
    ranks.call(ResumeCall())
    crowd.step_until_in_flight()
    with pytest.raises(InvalidRequest):
        ranks.call(UpdateFromFileCall("/nowhere/at/all"))
    ranks.run()
    crowd.check(expected)


def test_memory_is_accounted_with_no_step_in_flight(ranks, expected):
    """Would catch a question that ranks answer behind a step, by its own deadline, or an account that is never due."""
    crowd = Crowd(ranks, salt=12)
    crowd.step_until_in_flight()
    ranks.core._refreshed_at = -math.inf
    ranks.step()
    assert ranks.core._refreshed_at > 0
    assert not ranks.core._in_flight
    ranks.run()
    crowd.check(expected)


def test_requests_that_are_all_aborted_leave_no_step_behind(ranks):
    """Would catch an engine that rests while ranks are at work, and a state that tells the memory of before."""
    crowd = Crowd(ranks, salt=13)
    crowd.step_until_in_flight()
    ranks.core.abort(list(crowd.asked))
    ranks.core._deltas.clear()  # as if they had been told
    assert ranks.core.can_step
    ranks.run()
    assert not ranks.core._in_flight
    assert not ranks.executor._posted


def test_the_first_step_after_a_wake_for_requests_is_alone(ranks, expected, monkeypatch):
    """Would catch tokens of a second step that are given out although the canary then disagrees."""
    monkeypatch.setattr(ranks.core, "config", replace(ranks.core.config, on_sleeping_request="wake"))
    ranks.call(SleepCall(1))
    crowd = Crowd(ranks, salt=6)
    ranks.step()
    assert any(ranks.tokens[name] for name in crowd.asked) or ranks.core.stats.num_running
    assert not ranks.core._in_flight, "a second step was posted before the first had proven the wake"
    crowd.step_until_in_flight()
    ranks.run()
    crowd.check(expected)


# --- steps that fail --------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "how"), [(0, "error"), (1, "error"), (1, "late")])
def test_a_step_that_fails_takes_none_of_the_others_with_it(ranks, expected, rank, how):
    """Would catch requests that build on what was not computed, or whose sampler is a token ahead."""
    crowd = Crowd(ranks, salt=7)
    crowd.step_until_in_flight()
    crowd.step_until_in_flight()
    ranks.plan_fault(rank, f"execute {how}")
    ranks.run()
    failed = [name for name in crowd.asked if isinstance(ranks.ended[name], ShuteyeError)]
    assert 0 < len(failed) < len(crowd.asked)
    assert all(isinstance(ranks.ended[name], BackendFailure) for name in failed)
    crowd.check(expected, without=failed)
    assert ranks.core.state.faulted is None
    assert ranks.core.stats.num_free_blocks == ranks.core.stats.num_blocks


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_costs_no_request(ranks, expected, rank):
    crowd = Crowd(ranks, salt=8)
    crowd.step_until_in_flight()
    ranks.plan_fault(rank, "execute kill")
    ranks.step()
    ranks.wait_for_fault()
    assert not ranks.core._in_flight
    assert not [name for name in crowd.asked if isinstance(ranks.ended.get(name), ShuteyeError)]
    ranks.wake()
    ranks.run()
    crowd.check(expected)


def test_a_rank_that_dies_between_steps_costs_no_request(ranks, expected):
    crowd = Crowd(ranks, salt=9)
    crowd.step_until_in_flight()
    ranks.kill(0, signal.SIGKILL)
    ranks.wait_for_fault()
    assert not ranks.core._in_flight
    ranks.wake()
    ranks.run()
    crowd.check(expected)


def test_a_rank_that_hangs_is_killed_by_the_deadline_of_the_oldest_step(ranks, expected, monkeypatch):
    monkeypatch.setattr(ranks.executor, "_config", replace(ranks.executor._config, rank_timeout_s=1.0))
    monkeypatch.setattr(multiproc, "_GRACE_S", 0.3)
    crowd = Crowd(ranks, salt=10)
    crowd.step_until_in_flight()
    ranks.plan_fault(1, "execute hang")
    begun = time.monotonic()
    assert "did not answer execute" in ranks.wait_for_fault(within_s=8.0)
    assert time.monotonic() - begun >= 1.0
    assert not ranks.core._in_flight
    monkeypatch.setattr(ranks.executor, "_config", replace(ranks.executor._config, rank_timeout_s=60.0))
    ranks.wake()
    ranks.run()
    crowd.check(expected)


def test_requests_whose_first_step_was_not_even_posted_are_admitted_again(ranks, expected):
    """Would catch requests that the sampler has never heard of."""
    crowd = Crowd(ranks, salt=14)
    crowd.step_until_in_flight()
    time.sleep(0.3)  # the step in flight is done, though not collected
    ranks.plan_fault(1, "execute error")
    ranks.step()
    deadline = time.monotonic() + SOON_S
    while not ranks.executor._groups.aborted:
        assert time.monotonic() < deadline, "the step did not fail"
        time.sleep(0.001)
    late = Crowd(ranks, (5, 9), salt=15)
    ranks.run()
    late.check(expected)
    assert any(isinstance(ranks.ended[name], BackendFailure) for name in crowd.asked)


def test_nothing_is_posted_behind_a_step_that_has_failed(ranks, expected):
    """Would catch new groups that are met in while an answer from the old ones is still on its way."""
    crowd = Crowd(ranks, salt=11)
    crowd.step_until_in_flight()
    executor = ranks.executor
    executor._abort("a test says so")
    ticket = executor.post(ranks.core._in_flight[0].plan)
    assert isinstance(ticket.error, GroupAborted)
    executor._posted.remove(ticket)
    ranks.run()
    ended = [ranks.ended[name] for name in crowd.asked]
    assert not [one for one in ended if isinstance(one, RankLost)]
    crowd.check(expected, without=[name for name in crowd.asked if ranks.ended[name] != "length"])


# --- ranks of their own, after whose start those above look elsewhere for their faults --------------------


def test_requests_without_blocks_are_preempted_and_nobody_in_flight(open_ranks, expected):
    """Would catch a sequence whose blocks are given away while a step computes it, and requests that wait for ever."""
    ranks = open_ranks("PP 2", kv_cache_memory=18 * BLOCK_BYTES, max_num_batched_tokens=32)
    crowd = Crowd(ranks, (40, 33, 50, 20, 64, 44, 9, 70), salt=3)
    ranks.run()
    crowd.check(expected)
    assert ranks.core.stats.num_preemptions_total > 0
    ranks.executor.close()


@pytest.mark.slow
def test_three_stages_give_what_one_rank_gives(open_ranks, make_harness, tmp_path):
    model = str(tiny_model(tmp_path / "three", num_layers=3))
    alone = make_harness(model=model)
    ranks = open_ranks("PP 2", pipeline_parallel_size=3, model=model, max_num_batched_tokens=32)
    crowd = Crowd(ranks, LENGTHS * 2)
    crowd.step_until_in_flight()
    assert len(ranks.core._in_flight) == 2
    gone = list(crowd.asked)[::4]
    ranks.core.abort(gone)
    ranks.run()
    crowd.check(alone.generate, without=gone)
    ranks.executor.close()
