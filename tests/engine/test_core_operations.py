"""The engine core as operators see it: who is given up after a fault, wakes nobody asked for, what may be called."""

import time

import pytest
from core_harness import wake_to_wrong_bytes

from shuteye.calls import PauseCall, ResumeCall, RpcCall, SleepCall, WakeCall
from shuteye.errors import EngineFaulted, InvalidRequest, ModelSleeping, ShuteyeError, TransitionConflict
from shuteye.state import WakeReport

PROMPT = (5, 6, 7, 8)


def run_until_fault(harness):
    harness.add("kept", PROMPT)
    harness.step()
    harness.backend.fail_next("release", when="after")
    with pytest.raises(EngineFaulted):
        harness.call(SleepCall(1, mode="keep"))
    assert harness.core.state.faulted


def test_requests_kept_through_a_fault_are_given_up_in_time(make_harness):
    """Would catch streams that stay open for ever because nobody comes to recover the engine."""
    harness = make_harness(hold_timeout_s=0.05)
    run_until_fault(harness)
    deadline = harness.core.next_deadline
    assert 0 < deadline - time.monotonic() <= 0.05
    assert not harness.core.can_step, "the loop would spin instead of waiting for the deadline"
    time.sleep(0.06)
    harness.step()
    assert isinstance(harness.ended["kept"], EngineFaulted)
    assert harness.core.next_deadline is None


def test_requests_held_by_a_pause_are_given_up_too(make_harness):
    """Would catch requests in the other queue, which has no deadline during a pause."""
    harness = make_harness(hold_timeout_s=0.05)
    harness.call(PauseCall("keep"))
    harness.add("held", PROMPT)
    harness.backend.fail_next("release", when="after")
    with pytest.raises(EngineFaulted):
        harness.call(SleepCall(1, mode="keep"))
    time.sleep(0.06)
    harness.step()
    assert isinstance(harness.ended["held"], EngineFaulted)


def test_a_recovery_in_time_saves_them(make_harness):
    """Would catch a deadline that outlives the fault, and requests that fail although the engine is well."""
    harness = make_harness(hold_timeout_s=0.2)
    right = harness.generate(PROMPT)
    run_until_fault(harness)
    harness.call(WakeCall())
    harness.run()
    assert harness.ended["kept"] == "length"
    assert harness.tokens["kept"] == right
    assert harness.core.next_deadline is None
    time.sleep(0.2)
    assert harness.generate(PROMPT) == right


def test_wakes_by_policy_are_told_once(make_harness):
    """Would catch wakes that no metric counts, and those of callers counted twice."""
    harness = make_harness(on_sleeping_request="wake")
    harness.call(SleepCall(1))
    harness.call(WakeCall())
    assert harness.core.take_auto_wakes() == []
    harness.call(SleepCall(1))
    harness.generate(PROMPT)
    (report,) = harness.core.take_auto_wakes()
    assert isinstance(report, WakeReport)
    assert report.changed
    assert report.restored_bytes > 0
    assert harness.core.take_auto_wakes() == []


@pytest.mark.parametrize("policy", ["wake", "hold"])
def test_a_request_that_woke_a_paused_model_waits_for_resume(make_harness, policy):
    """Would catch a 503 that says the model sleeps, and to wake it, while it is awake and only paused."""
    harness = make_harness(on_sleeping_request=policy, hold_timeout_s=0.05)
    expected = harness.generate(PROMPT)
    harness.call(PauseCall("keep"))
    harness.call(SleepCall(1))
    harness.add("a", PROMPT)
    if policy == "hold":
        harness.call(WakeCall())
    harness.run()
    assert not harness.core.state.is_sleeping
    assert harness.core.next_deadline is None
    time.sleep(0.06)
    harness.step()
    assert harness.ended.keys() == {"generate-0"}
    harness.call(ResumeCall())
    harness.run()
    assert harness.tokens["a"] == expected


def test_a_wake_by_policy_defers_nothing_while_memory_is_distrusted(make_harness, monkeypatch):
    """Would catch a gate that opens, after a wake that found wrong bytes, before the canary has run."""
    harness = make_harness(on_sleeping_request="wake")
    harness.call(SleepCall(1))
    wake_to_wrong_bytes(harness, monkeypatch)
    harness.generate(PROMPT)
    harness.call(SleepCall(1))
    harness.generate(PROMPT)
    reports = harness.core.take_auto_wakes()
    assert [(report.verified, report.canary) for report in reports] == [("full", True), ("full", False)]


def test_a_half_woken_model_lets_nobody_wait_for_ever(make_harness):
    """Would catch a deadline that goes with the first tag that wakes."""
    harness = make_harness(on_sleeping_request="hold", hold_timeout_s=0.05)
    harness.call(SleepCall(1))
    harness.add("a", PROMPT)
    harness.call(WakeCall(("weights",)))
    time.sleep(0.06)
    harness.step()
    assert isinstance(harness.ended["a"], ModelSleeping)


def test_wakes_by_policy_that_fail_are_told_with_their_error(make_harness):
    """Would catch a wake that fails all night, and shows in no figure."""
    harness = make_harness(on_sleeping_request="wake")
    harness.call(SleepCall(1))
    harness.backend.fail_next("map_file")
    with pytest.raises(ShuteyeError):
        harness.generate(PROMPT)
    (error,) = harness.core.take_auto_wakes()
    assert type(error).__name__ == "WakeFailed"
    assert not isinstance(error, ModelSleeping)


def test_when_sequences_got_their_place_is_told_once(harness):
    """Would catch queue times that are missing, or begin anew after a preemption."""
    before = time.monotonic()
    harness.add("a", PROMPT)
    harness.step()
    ((name, at),) = harness.core.take_started()
    assert (name, before <= at <= time.monotonic()) == ("a", True)
    harness.call(SleepCall(1, mode="keep"))
    harness.call(WakeCall())
    harness.run()
    assert harness.core.take_started() == ()


@pytest.mark.parametrize(
    ("verb", "args", "param"),
    [
        ("release", (), "method"),
        ("verify", (), "args"),
        ("verify", ("all",), "args"),
        ("facts", (1,), "args"),
        ("reload_weights", (1,), "args"),
        ("reload_weights", ("",), "args"),
        ("reload_weights", ("a", "b"), "args"),
    ],
)
def test_collective_rpc_calls_nothing_else(harness, verb, args, param):
    """Would catch a way around the sleep controller, and an InternalError for a caller's mistake."""
    with pytest.raises(InvalidRequest) as refused:
        harness.call(RpcCall(verb, args))
    assert refused.value.param == param
    assert harness.call(RpcCall("verify", ("full",)))[0].verified_bytes > 0


def test_vllms_recipe_brings_weights_back_after_level_2(harness):
    """A program written for vLLM that ends at its third call, or goes on with weights that nobody wrote."""
    before = harness.generate(range(3, 20))
    harness.call(SleepCall(2))
    with pytest.raises(TransitionConflict):
        harness.call(RpcCall("reload_weights"))
    harness.call(WakeCall(tags=("weights",)))
    [report] = harness.call(RpcCall("reload_weights"))
    assert report.updated > 0
    assert not report.missing
    harness.call(WakeCall(tags=("kv_cache",)))
    assert harness.generate(range(3, 20)) == before


def test_a_path_reaches_the_reload_that_collective_rpc_asks_for(harness, tmp_path):
    """Weights of the image loaded again, in the place of those that were named."""
    before = harness.generate(range(3, 20))
    with pytest.raises(InvalidRequest, match=tmp_path.name):
        harness.call(RpcCall("reload_weights", (str(tmp_path),)))
    assert harness.generate(range(3, 20)) == before
