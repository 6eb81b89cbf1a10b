"""The engine core as operators see it: who is given up after a fault, wakes nobody asked for, what may be called."""

import time

import pytest
from rigs import wake_to_wrong_bytes

from shuteye.calls import PauseCall, ResumeCall, RpcCall, SleepCall, WakeCall
from shuteye.errors import EngineFaulted, InvalidRequest, ModelSleeping, ShuteyeError
from shuteye.state import WakeReport

PROMPT = (5, 6, 7, 8)


def run_until_fault(rig):
    rig.add("kept", PROMPT)
    rig.step()
    rig.backend.fail_next("release", when="after")
    with pytest.raises(EngineFaulted):
        rig.call(SleepCall(1, mode="keep"))
    assert rig.core.state.faulted


def test_requests_kept_through_a_fault_are_given_up_in_time(make_rig):
    """Would catch streams that stay open for ever because nobody comes to recover the engine."""
    rig = make_rig(hold_timeout_s=0.05)
    run_until_fault(rig)
    deadline = rig.core.next_deadline
    assert 0 < deadline - time.monotonic() <= 0.05
    assert not rig.core.can_step, "the loop would spin instead of waiting for the deadline"
    time.sleep(0.06)
    rig.step()
    assert isinstance(rig.ended["kept"], EngineFaulted)
    assert rig.core.next_deadline is None


def test_requests_held_by_a_pause_are_given_up_too(make_rig):
    """Would catch requests in the other queue, which has no deadline during a pause."""
    rig = make_rig(hold_timeout_s=0.05)
    rig.call(PauseCall("keep"))
    rig.add("held", PROMPT)
    rig.backend.fail_next("release", when="after")
    with pytest.raises(EngineFaulted):
        rig.call(SleepCall(1, mode="keep"))
    time.sleep(0.06)
    rig.step()
    assert isinstance(rig.ended["held"], EngineFaulted)


def test_a_recovery_in_time_saves_them(make_rig):
    """Would catch a deadline that outlives the fault, and requests that fail although the engine is well."""
    rig = make_rig(hold_timeout_s=0.2)
    right = rig.generate(PROMPT)
    run_until_fault(rig)
    rig.call(WakeCall())
    rig.run()
    assert rig.ended["kept"] == "length"
    assert rig.tokens["kept"] == right
    assert rig.core.next_deadline is None
    time.sleep(0.2)
    assert rig.generate(PROMPT) == right


def test_wakes_by_policy_are_told_once(make_rig):
    """Would catch wakes that no metric counts, and those of callers counted twice."""
    rig = make_rig(on_sleeping_request="wake")
    rig.call(SleepCall(1))
    rig.call(WakeCall())
    assert rig.core.take_auto_wakes() == []
    rig.call(SleepCall(1))
    rig.generate(PROMPT)
    (report,) = rig.core.take_auto_wakes()
    assert isinstance(report, WakeReport)
    assert report.changed
    assert report.restored_bytes > 0
    assert rig.core.take_auto_wakes() == []


@pytest.mark.parametrize("policy", ["wake", "hold"])
def test_a_request_that_woke_a_paused_model_waits_for_resume(make_rig, policy):
    """Would catch a 503 that says the model sleeps, and to wake it, while it is awake and only paused."""
    rig = make_rig(on_sleeping_request=policy, hold_timeout_s=0.05)
    expected = rig.generate(PROMPT)
    rig.call(PauseCall("keep"))
    rig.call(SleepCall(1))
    rig.add("a", PROMPT)
    if policy == "hold":
        rig.call(WakeCall())
    rig.run()
    assert not rig.core.state.is_sleeping
    assert rig.core.next_deadline is None
    time.sleep(0.06)
    rig.step()
    assert rig.ended.keys() == {"generate-0"}
    rig.call(ResumeCall())
    rig.run()
    assert rig.tokens["a"] == expected


def test_a_wake_by_policy_defers_nothing_while_memory_is_distrusted(make_rig, monkeypatch):
    """Would catch a gate that opens, after a wake that found wrong bytes, before the canary has run."""
    rig = make_rig(on_sleeping_request="wake")
    rig.call(SleepCall(1))
    wake_to_wrong_bytes(rig, monkeypatch)
    rig.generate(PROMPT)
    rig.call(SleepCall(1))
    rig.generate(PROMPT)
    reports = rig.core.take_auto_wakes()
    assert [(report.verified, report.canary) for report in reports] == [("full", True), ("full", False)]


def test_a_half_woken_model_lets_nobody_wait_for_ever(make_rig):
    """Would catch a deadline that goes with the first tag that wakes."""
    rig = make_rig(on_sleeping_request="hold", hold_timeout_s=0.05)
    rig.call(SleepCall(1))
    rig.add("a", PROMPT)
    rig.call(WakeCall(("weights",)))
    time.sleep(0.06)
    rig.step()
    assert isinstance(rig.ended["a"], ModelSleeping)


def test_wakes_by_policy_that_fail_are_told_with_their_error(make_rig):
    """Would catch a wake that fails all night, and shows in no figure."""
    rig = make_rig(on_sleeping_request="wake")
    rig.call(SleepCall(1))
    rig.backend.fail_next("map_file")
    with pytest.raises(ShuteyeError):
        rig.generate(PROMPT)
    (error,) = rig.core.take_auto_wakes()
    assert type(error).__name__ == "WakeFailed"
    assert not isinstance(error, ModelSleeping)


def test_when_sequences_got_their_place_is_told_once(rig):
    """Would catch queue times that are missing, or begin anew after a preemption."""
    before = time.monotonic()
    rig.add("a", PROMPT)
    rig.step()
    ((name, at),) = rig.core.take_started()
    assert (name, before <= at <= time.monotonic()) == ("a", True)
    rig.call(SleepCall(1, mode="keep"))
    rig.call(WakeCall())
    rig.run()
    assert rig.core.take_started() == ()


@pytest.mark.parametrize(
    ("verb", "args", "param"),
    [("release", (), "method"), ("verify", (), "args"), ("verify", ("all",), "args"), ("facts", (1,), "args")],
)
def test_collective_rpc_calls_nothing_else(rig, verb, args, param):
    """Would catch a way around the sleep controller, and an InternalError for a caller's mistake."""
    with pytest.raises(InvalidRequest) as refused:
        rig.call(RpcCall(verb, args))
    assert refused.value.param == param
    assert rig.call(RpcCall("verify", ("full",)))[0].verified_bytes > 0
