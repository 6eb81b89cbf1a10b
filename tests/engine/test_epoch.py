"""What was computed belongs to the epoch of the memory that it was computed in, and is never used in another.

Each layer is tried by itself, and then with the others broken on purpose: a request may fail, but no token is wrong.
"""

from dataclasses import replace

import pytest
from core_harness import GREEDY
from faults import bring_awake

from shuteye.cache.blocks import BlockPool
from shuteye.calls import ReloadCall, ResetPrefixCacheCall, SleepCall, UpdateCall, WakeCall
from shuteye.errors import InternalError, ShuteyeError
from shuteye.memory.residency import Residency
from shuteye.state import SleepPlan, WakePlan
from shuteye.tasks.generate.scheduler import Scheduler
from shuteye.worker import Worker

PROMPT = tuple(range(5, 45))
NAME = "model.layers.0.self_attn.v_proj.weight"
"""What the cache holds depends on it, and the tokens on what the cache holds."""

NUM_BEFORE = 4


def negate(harness):
    names = [name for name in harness.tensors() if name.endswith("v_proj.weight")]
    harness.call(UpdateCall(named_tensors=[(name, -harness.tensors()[name].clone()) for name in names]))


def fault_and_recover(harness):
    harness.core._sleep.fault("a test says so")
    harness.call(WakeCall())


def sleep_and_wake(level, tags=None):
    def change(harness):
        harness.call(SleepCall(level, tags=tags, mode="keep"))
        harness.call(WakeCall())

    return change


def rewrite_after_level_2(harness):
    tensors = [(name, tensor.clone()) for name, tensor in harness.tensors().items()]
    harness.call(SleepCall(2, mode="keep"))
    harness.call(WakeCall(("weights",)))
    harness.call(UpdateCall(named_tensors=tensors))
    harness.call(WakeCall())


CHANGES = {
    # name: (what is done while a request runs, the weights that this leads to from the image's and from negated ones)
    "sleep 1": (sleep_and_wake(1), ("image", "negated")),
    "sleep 1 kv_cache": (sleep_and_wake(1, ("kv_cache",)), ("image", "negated")),
    "sleep 1 weights": (sleep_and_wake(1, ("weights",)), ("image", "negated")),
    "sleep 2": (sleep_and_wake(2), ("image", "image")),
    "update": (negate, ("negated", "image")),
    "reload": (lambda harness: harness.call(ReloadCall()), ("image", "image")),
    "rewrite after level 2": (rewrite_after_level_2, ("image", "negated")),
    "fault and recovery": (fault_and_recover, ("image", "image")),
}


@pytest.fixture
def truth(make_harness):
    """What a fresh engine without a prefix cache says on some weights: `truth(weights, prompt, num_tokens)`."""

    def generate(weights, prompt, num_tokens):
        harness = make_harness(enable_prefix_caching=False)
        if weights == "negated":
            negate(harness)
        return harness.generate(prompt, replace(GREEDY, max_tokens=num_tokens))

    return generate


def run_through(harness, apply, *, negated):
    """A request before, one in flight during, and one after `apply`, of the same prompt; the tokens until then."""
    if negated:
        negate(harness)
    harness.generate(PROMPT)  # leaves its blocks for others to find
    harness.add("in flight", PROMPT)
    while len(harness.tokens["in flight"]) < NUM_BEFORE:
        harness.step()
    before = list(harness.tokens["in flight"])
    apply(harness)
    harness.add("new", PROMPT)
    harness.run()
    return before


@pytest.mark.parametrize("negated", [False, True], ids=["image", "negated"])
@pytest.mark.parametrize("name", CHANGES)
def test_nothing_computed_before_a_change_is_used_after_it(make_harness, truth, name, negated):
    """Would catch blocks or prefixes that outlive the memory or the weights they were computed with."""
    apply, leads_to = CHANGES[name]
    harness = make_harness()
    before = run_through(harness, apply, negated=negated)
    weights = leads_to[negated]
    assert harness.tokens["new"] == truth(weights, PROMPT, GREEDY.max_tokens)
    rest = GREEDY.max_tokens - NUM_BEFORE
    assert harness.tokens["in flight"] == before + truth(weights, (*PROMPT, *before), rest)


_call = Worker.call


def _told_of_no_epoch(worker, verb, *args):
    return 2 if verb == "epoch" else _call(worker, verb, *args)  # as it is once loaded


MUTATIONS = {
    "the core tells the scheduler nothing": (Scheduler, "enter_epoch", lambda _self, _epoch: None),
    "the scheduler resets no prefixes": (Scheduler, "reset_prefix_cache", lambda _self: None),
    "the pool forgets nothing": (BlockPool, "forget_all", lambda _self: None),
    "no rank tells": (Worker, "call", _told_of_no_epoch),
    "nothing is preempted": (Scheduler, "preempt_all", lambda _self: 0),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("name", CHANGES)
def test_without_one_of_the_guards_a_request_fails_but_no_token_is_wrong(
    make_harness, monkeypatch, truth, name, mutation
):
    """Would catch a design whose right answers depend on somebody who remembers to reset something."""
    apply, (weights, _) = CHANGES[name]
    right = truth(weights, PROMPT, GREEDY.max_tokens)
    harness = make_harness()

    def apply_broken(harness):
        monkeypatch.setattr(*MUTATIONS[mutation])
        apply(harness)

    if mutation == "nothing is preempted":
        with pytest.raises(AssertionError, match="another epoch"):
            run_through(harness, apply_broken, negated=False)
        return
    before = run_through(harness, apply_broken, negated=False)
    monkeypatch.undo()
    continued = before + truth(weights, (*PROMPT, *before), GREEDY.max_tokens - NUM_BEFORE)
    for request_id, expected in [("new", right), ("in flight", continued)]:
        ended, tokens = harness.ended[request_id], harness.tokens[request_id]
        refused = isinstance(ended, InternalError)
        assert not refused or "epoch" in ended.message
        assert tokens == expected[: len(tokens)], "tokens of another epoch were served"
        assert refused or len(tokens) == len(expected)


def test_a_request_that_was_refused_over_an_epoch_does_not_stop_the_next_one(harness):
    """Would catch an engine that never looks again where its memory is, once it was wrong about it."""
    before = harness.generate(PROMPT)
    harness.worker.residency.release(SleepPlan(kv_cache="discard"))  # behind the engine's back
    harness.worker.residency.restore(WakePlan(kv_cache="commit"))
    with pytest.raises(InternalError, match="epoch"):
        harness.generate(PROMPT)
    assert harness.generate(PROMPT) == before


def test_an_update_that_was_refused_leaves_requests_where_they_are(harness):
    """Would catch work that is thrown away although nothing was written."""
    harness.add("in flight", PROMPT)
    while len(harness.tokens["in flight"]) < 4:
        harness.step()
    with pytest.raises(Exception, match="not a tensor"):
        harness.call(UpdateCall(named_tensors=[("no such", harness.tensors()[NAME])]))
    harness.run()
    assert harness.core.stats.num_preemptions_total == 0
    assert harness.tokens["in flight"] == harness.generate(PROMPT, GREEDY)


def test_resetting_the_prefix_cache_is_no_other_epoch(harness):
    """Would catch running requests that are computed again because somebody cleared what others may share."""
    harness.add("in flight", PROMPT)
    harness.step()
    harness.call(ResetPrefixCacheCall())
    harness.run()
    assert harness.core.stats.num_preemptions_total == 0


@pytest.mark.parametrize(
    ("setup", "call", "verb"),
    [
        ((), SleepCall(1, mode="keep"), "release"),
        ((), SleepCall(2, mode="keep"), "release"),
        ((), SleepCall(1, tags=("kv_cache",), mode="keep"), "release"),
        ((), ReloadCall(), "reload_weights"),
        ((), ReloadCall(), "verify"),
        ((), ReloadCall(), "canary_agrees"),
        ((SleepCall(1, mode="keep"),), WakeCall(), "restore"),
        ((SleepCall(2, mode="keep"),), WakeCall(), "canary_agrees"),
        ((SleepCall(1, tags=("kv_cache",), mode="keep"),), WakeCall(), "canary_agrees"),
    ],
)
def test_requests_in_flight_outlive_a_rank_that_fails_after_it_did_everything(
    make_harness, monkeypatch, setup, call, verb
):
    """Would catch running requests that go on with blocks which the recovery has thrown away."""
    harness = make_harness()
    before = harness.generate(PROMPT)
    harness.add("in flight", PROMPT)
    while len(harness.tokens["in flight"]) < NUM_BEFORE:
        harness.step()
    for one in setup:
        harness.call(one)

    def fail_once(worker, called, *args):
        done = _call(worker, called, *args)
        if called != verb:
            return done
        monkeypatch.setattr(Worker, "call", _call)
        raise RuntimeError("a test says so")

    monkeypatch.setattr(Worker, "call", fail_once)
    with pytest.raises(ShuteyeError, match="a test says so"):
        harness.call(call)
    bring_awake(harness)
    harness.run()
    assert (harness.ended["in flight"], harness.tokens["in flight"]) == ("length", before)
    assert harness.generate(PROMPT) == before


class TestResidency:
    @pytest.mark.parametrize(
        ("setup", "act"),
        [
            ((), lambda r: r.release(SleepPlan(kv_cache="discard"))),
            ((), lambda r: r.release(SleepPlan(weights="discard"))),
            ((lambda r: r.save(SleepPlan(weights="offload")),), lambda r: r.release(SleepPlan(weights="offload"))),
            ((lambda r: r.release(SleepPlan(kv_cache="discard")),), lambda r: r.restore(WakePlan(kv_cache="commit"))),
            ((lambda r: r.release(SleepPlan(weights="discard")),), lambda r: r.restore(WakePlan(weights="reload"))),
            ((lambda r: r.release(SleepPlan(weights="discard")),), lambda r: r.restore(WakePlan(weights="blank"))),
            ((), lambda r: r.mark_written(NAME)),
            ((), Residency.reset),
        ],
        ids=["release kv", "discard", "offload", "commit", "reload", "blank", "write", "reset"],
    )
    def test_whatever_changes_memory_raises_the_epoch(self, harness, setup, act):
        """A change that raises nothing would let what was computed before it be used."""
        residency = harness.worker.residency
        for one in setup:
            one(residency)
        before = residency.epoch()
        act(residency)
        assert residency.epoch() > before

    def test_a_release_that_fails_raises_it_all_the_same(self, harness):
        """Half of the memory may be gone: blocks that were in it must not be trusted."""
        residency = harness.worker.residency
        before = residency.epoch()
        harness.backend.clear()
        harness.backend.fail_at(0, when="after")
        with pytest.raises(Exception, match="Injected"):
            residency.release(SleepPlan(kv_cache="discard"))
        assert residency.epoch() > before
        harness.backend.clear()
        residency.reset()
