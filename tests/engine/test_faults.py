"""A fault at every step of every transition: the old state, the new one, or FAULTED; never a wrong token.

The steps are enumerated by running the transition until the injected fault is never reached.
"""

import pytest
from faults import PARAMS, PROMPT, SLEEP_KEEP, TRANSITIONS, bring_awake, inject, make_dirty

from shuteye.calls import ReloadCall, SleepCall, WakeCall
from shuteye.errors import EngineFaulted, ShuteyeError
from shuteye.state import VerifyResult

MAX_STEPS = 200


@pytest.mark.parametrize("dirty", [False, True], ids=["clean", "written"])
@pytest.mark.parametrize("name", TRANSITIONS)
def test_a_fault_at_every_step(make_harness, name, dirty):
    """Would catch a half-done transition that is taken for done, or from which no way leads back."""
    setup, call = TRANSITIONS[name]
    harness = make_harness()
    expected = {"image": harness.generate(PROMPT, PARAMS)}
    make_dirty(harness)
    expected["updated"] = harness.generate(PROMPT, PARAMS)
    harness.call(ReloadCall())
    assert expected["updated"] != expected["image"]

    injected = 0
    for step in range(MAX_STEPS):
        reached = [inject(harness, setup, call, dirty, expected, step, when) for when in ("before", "after")]
        injected += sum(reached)
        if not any(reached):
            break
    else:
        raise AssertionError(f"{name} takes more than {MAX_STEPS} steps")
    assert injected >= 2, "no step of this transition can fail?"


def test_a_held_request_survives_every_fault_of_sleep_and_wake(harness):
    """Would catch a request that is lost, or that resumes on memory it did not recompute."""
    expected = harness.generate(PROMPT, PARAMS)
    for step in range(MAX_STEPS):
        request_id = f"held-{step}"
        harness.add(request_id, PROMPT, PARAMS)
        for _ in range(5):
            harness.step()
        harness.backend.clear()
        harness.backend.fail_at(step)
        for call in (SLEEP_KEEP, WakeCall()):
            try:
                harness.call(call)
            except ShuteyeError:
                assert request_id not in harness.ended
        reached = len(harness.backend.steps) > step
        harness.backend.clear()
        bring_awake(harness)
        harness.run()
        assert harness.tokens[request_id] == expected
        if not reached:
            return
    raise AssertionError("the transitions never ended")


def test_a_fault_while_recovering_is_still_a_fault_and_can_be_retried(harness):
    expected = harness.generate(PROMPT, PARAMS)
    harness.backend.fail_next("release", when="after")
    with pytest.raises(EngineFaulted):
        harness.call(SLEEP_KEEP)
    harness.backend.fail_next("release")
    with pytest.raises(ShuteyeError):
        harness.call(WakeCall())
    assert harness.core.state.gate == "closed"
    bring_awake(harness)
    assert harness.generate(PROMPT, PARAMS) == expected


def test_a_failed_reload_can_be_repeated_without_sleep_mode(make_harness):
    """Would catch an engine whose weights are gone and whose every way back is refused."""
    harness = make_harness(enable_sleep_mode=False)
    expected = harness.generate(PROMPT)
    harness.backend.fail_next("map_file")
    with pytest.raises(ShuteyeError):
        harness.call(ReloadCall())
    assert harness.core.state.is_sleeping
    assert harness.call(WakeCall()).changed
    assert harness.generate(PROMPT) == expected


def test_a_reload_that_cannot_even_be_undone_is_a_fault(harness):
    """Would catch an error that says faulted while the state says that all is well."""
    expected = harness.generate(PROMPT)
    harness.backend.clear()
    harness.call(ReloadCall())
    at = harness.backend.steps.index("map_file")
    harness.backend.clear()
    harness.backend.fail_at(at)
    harness.backend.fail_at(at + 1)  # the release that undoes it
    with pytest.raises(EngineFaulted):
        harness.call(ReloadCall())
    assert harness.core.state.faulted
    harness.call(WakeCall())
    assert harness.generate(PROMPT) == expected


def test_a_wake_that_fails_and_cannot_be_undone_is_a_fault(harness, monkeypatch):
    """Would catch memory that is known to be wrong and stays mapped, while the engine says that it is asleep."""
    expected = harness.generate(PROMPT)
    harness.call(SleepCall(1))
    monkeypatch.setattr(harness.worker.residency, "verify", lambda _mode: VerifyResult(1, (0,)))
    harness.backend.fail_next("release")
    with pytest.raises(EngineFaulted, match="rolling back a wake failed"):
        harness.call(WakeCall())
    assert harness.core.state.faulted
    monkeypatch.undo()
    harness.call(WakeCall())
    assert harness.generate(PROMPT) == expected


def test_level_0_is_refused_while_faulted(harness):
    """Would catch level 0 answering as if there were a model to pause."""
    harness.backend.fail_next("release")
    with pytest.raises(EngineFaulted):
        harness.call(SleepCall(1))
    with pytest.raises(EngineFaulted):
        harness.call(SleepCall(0))


def test_a_state_that_cannot_be_read_is_reported_once(harness):
    """Would catch a fault that wraps its own message in itself."""
    harness.call(SleepCall(1))
    harness.backend.clear()
    harness.call(WakeCall())
    at = len(harness.backend.steps) - 1 - harness.backend.steps[::-1].index("resident_bytes")
    harness.call(SleepCall(1))
    harness.backend.clear()
    harness.backend.fail_at(at)
    with pytest.raises(EngineFaulted) as caught:
        harness.call(WakeCall())
    assert caught.value.message.count("Nothing is served") == 1
