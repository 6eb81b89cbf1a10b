"""Every transition with a fault at one of its steps: set up, failed, checked and recovered."""

import pytest

from shuteye.calls import ReloadCall, SleepCall, UpdateCall, WakeCall
from shuteye.errors import EngineFaulted, ShuteyeError
from shuteye.tasks.generate.requests import SamplingParams

PROMPT = tuple(range(5, 45))
PARAMS = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
SLEEP_KEEP = SleepCall(1, mode="keep")
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


def tensors_of(harness):
    return {name: tensor.clone() for name, tensor in harness.tensors().items()}


def make_dirty(harness):
    name = "model.norm.weight"
    harness.call(UpdateCall(named_tensors=[(name, -tensors_of(harness)[name])]))


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
