"""A fault at every step of every transition: the old state, the new one, or FAULTED; never a wrong token.

The steps are enumerated by running the transition until the injected fault is never reached.
"""

import pytest

from shuteye.calls import ReloadCall, SleepCall, UpdateCall, WakeCall
from shuteye.errors import EngineFaulted, ShuteyeError
from shuteye.state import VerifyResult
from shuteye.tasks.generate.requests import SamplingParams

PROMPT = tuple(range(5, 45))
PARAMS = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
SLEEP_KEEP = SleepCall(1, mode="keep")
MAX_STEPS = 200


def tensors_of(harness):
    return {name: tensor.clone() for name, tensor in harness.tensors().items()}


def make_dirty(harness):
    name = "model.norm.weight"
    harness.call(UpdateCall(named_tensors=[(name, -tensors_of(harness)[name])]))


TRANSITIONS = {
    # name: (calls that lead there from awake, the call under test)
    "sleep 1": ((), SLEEP_KEEP),
    "sleep 2": ((), SleepCall(2, mode="keep")),
    "sleep 1 kv_cache": ((), SleepCall(1, tags=("kv_cache",), mode="keep")),
    "sleep 1 weights": ((), SleepCall(1, tags=("weights",), mode="keep")),
    "sleep 2 weights": ((), SleepCall(2, tags=("weights",), mode="keep")),
    "deepen 1 to 2": ((SLEEP_KEEP,), SleepCall(2, mode="keep")),
    "rest of the tags": ((SleepCall(1, tags=("kv_cache",), mode="keep"),), SLEEP_KEEP),
    "sleep 2 from blank": ((SleepCall(2, mode="keep"), WakeCall(("weights",))), SleepCall(2, mode="keep")),
    "wake from 1": ((SLEEP_KEEP,), WakeCall()),
    "wake weights from 1": ((SLEEP_KEEP,), WakeCall(("weights",))),
    "wake kv_cache from 1": ((SLEEP_KEEP,), WakeCall(("kv_cache",))),
    "wake the rest from 1": ((SLEEP_KEEP, WakeCall(("weights",))), WakeCall(("kv_cache",))),
    "wake from 2": ((SleepCall(2, mode="keep"),), WakeCall()),
    "wake blank from 2": ((SleepCall(2, mode="keep"),), WakeCall(("weights",))),
    "reload awake": ((), ReloadCall()),
    "reload into blank": ((SleepCall(2, mode="keep"), WakeCall(("weights",))), ReloadCall()),
}


def state_of(harness):
    state = harness.core.state
    return tuple(tag.residency for tag in state.tags), state.gate, state.level


def bring_awake(harness):
    """From wherever a fault left it, by the calls a user has."""
    if harness.core.state.faulted:
        with pytest.raises(EngineFaulted):
            harness.generate(PROMPT, PARAMS)
        harness.call(WakeCall())
    if harness.core.state.missing:
        harness.call(ReloadCall())
    harness.call(WakeCall())
    assert harness.core.state.gate == "open"


def source(harness):
    """`image`, or `updated` if the weights in memory are not the image's."""
    return "updated" if "+" in harness.core._executor.call("weights_source")[0] else "image"


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


def inject(harness, setup, call, dirty, expected, step, when):
    """One round: set up, fail at `step`, check, recover, check again. False if the step was never reached."""
    if dirty:
        make_dirty(harness)
    for one in setup:
        harness.call(one)
    old = state_of(harness)
    harness.backend.clear()
    harness.backend.fail_at(step, when=when)
    error = None
    try:
        harness.call(call)
    except ShuteyeError as caught:
        error = caught
    reached = len(harness.backend.steps) > step
    harness.backend.clear()
    got = state_of(harness)
    if error is None:
        assert got != old or isinstance(call, ReloadCall)
    else:
        assert reached, f"failed without an injected fault: {error}"
        new = goal(call, old)
        discarded_by_reload = isinstance(call, ReloadCall) and got[0][0] == "discarded"
        assert got in (old, new) or harness.core.state.faulted or discarded_by_reload, (step, when, old, got, error)
    if not harness.core.state.faulted and error is not None and got == old and not isinstance(call, ReloadCall):
        harness.call(call)  # a retry of what was rolled back
    bring_awake(harness)
    assert harness.generate(PROMPT, PARAMS) == expected[source(harness)], (step, when, got, error)
    if dirty:
        harness.call(ReloadCall())
    return reached


def goal(call, old):
    """The state in which `call` ends when nothing fails."""
    (weights, kv), _, _ = old
    match call:
        case SleepCall(level=level, tags=tags):
            if tags is None or "weights" in tags:
                weights = "discarded" if level == 2 else "offloaded"
            if tags is None or "kv_cache" in tags:
                kv = "discarded"
        case WakeCall(tags=tags):
            if tags is None or "weights" in tags:
                partial = tags is not None and kv != "resident" and "kv_cache" not in tags
                weights = "blank" if weights == "discarded" and partial else "resident"
            if tags is None or "kv_cache" in tags:
                kv = "resident"
        case ReloadCall():
            weights = "resident"
    awake = weights == kv == "resident"
    level = None if awake else 2 if weights in ("discarded", "blank") else 1
    return (weights, kv), "open" if awake else "closed", level


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


def test_a_reload_that_fails_can_be_mended_without_sleep_mode(make_harness):
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


def test_a_faulted_engine_does_not_doze(harness):
    """Would catch level 0 answering as if there were a model to pause."""
    harness.backend.fail_next("release")
    with pytest.raises(EngineFaulted):
        harness.call(SleepCall(1))
    with pytest.raises(EngineFaulted):
        harness.call(SleepCall(0))


def test_a_state_nobody_can_tell_is_told_once(harness):
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
