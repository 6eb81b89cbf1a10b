"""What replicas are to be: what calls make of it, and which calls lead there."""

import itertools

import pytest

from shuteye.calls import PauseCall, ReloadCall, ResetPrefixCacheCall, ResumeCall, SleepCall, WakeCall
from shuteye.errors import InvalidRequest
from shuteye.ray.wanted import AWAKE, Wanted, after, calls_between

CALLS = (
    SleepCall(),
    SleepCall(2),
    SleepCall(0),
    SleepCall(tags=("kv_cache",)),
    WakeCall(),
    WakeCall(tags=("weights",)),
    PauseCall("keep"),
    PauseCall(),
    ResumeCall(),
)


def after_all(*calls, start=AWAKE):
    for call in calls:
        start = after(start, call)
    return start


def without_revision(wanted):
    return Wanted(wanted.asleep, wanted.level, wanted.dozing, wanted.paused)


@pytest.mark.parametrize(
    ("calls", "wanted"),
    [
        ([SleepCall()], Wanted(("weights", "kv_cache"), 1)),
        ([SleepCall(2), SleepCall(2)], Wanted(("weights", "kv_cache"), 2)),
        ([SleepCall(1), SleepCall(2)], Wanted(("weights", "kv_cache"), 2)),
        ([SleepCall(tags=("kv_cache",))], Wanted(("kv_cache",), None)),
        ([SleepCall(), WakeCall(("weights",))], Wanted(("kv_cache",), None)),
        ([SleepCall(), WakeCall(("kv_cache",))], Wanted(("weights",), 1)),
        ([SleepCall(), WakeCall()], Wanted()),
        ([SleepCall(0)], Wanted(dozing=True)),
        ([SleepCall(0), WakeCall()], Wanted()),
        ([SleepCall(0), SleepCall(tags=("kv_cache",)), WakeCall(("weights",))], Wanted(("kv_cache",), None, True)),
        ([PauseCall("keep"), SleepCall()], Wanted(("weights", "kv_cache"), 1, False, PauseCall("keep"))),
        ([PauseCall(), ResumeCall()], Wanted()),
        ([PauseCall(), WakeCall()], Wanted(paused=PauseCall())),
        ([SleepCall(0), ResumeCall()], Wanted()),
    ],
)
def test_calls_add_up(calls, wanted):
    assert without_revision(after_all(*calls)) == wanted
    assert after_all(*calls).revision == len(calls)


@pytest.mark.parametrize("call", [SleepCall(3), SleepCall(tags=("kv",)), WakeCall(()), PauseCall("soon")])
def test_what_there_is_not_is_refused(call):
    with pytest.raises(InvalidRequest):
        after(AWAKE, call)


@pytest.mark.parametrize("call", [ResetPrefixCacheCall(), ReloadCall()])
def test_calls_that_lead_nowhere_change_nothing(call):
    assert after(AWAKE, call) == AWAKE


def refused_by_engines(present, call):
    """As `engine.transitions` has it."""
    match call:
        case ResumeCall() | SleepCall(level=0):
            return bool(present.asleep)
        case SleepCall(level=1):
            return present.level == 2 and "weights" in (call.tags or ("weights",))
    return False


def carried_out(calls, start=AWAKE):
    """Where engines end, and whether they refuse a call on the way."""
    for call in calls:
        if refused_by_engines(start, call):
            return start, True
        start = after(start, call)
    return start, False


def test_from_everywhere_to_everywhere():
    """A replica that missed calls ends where the others are, whatever it was, by calls that its engine takes."""
    ways = [carried_out(calls) for calls in itertools.product(CALLS, repeat=3)]
    states = {without_revision(state) for state, refused in ways if not refused}
    assert len(states) > 10
    for present, wanted in itertools.product(states, repeat=2):
        calls = calls_between(present, wanted)
        ended, refused = carried_out(calls, present)
        assert not refused, (present, wanted, calls)
        assert without_revision(ended) == wanted, (present, wanted, calls)
        assert (calls == ()) == (present == wanted)


def test_a_deeper_sleep_needs_no_wake_and_a_shallower_one_does():
    """A replica maps gigabytes only to give them back; or a level 1 over discarded weights, which engines refuse."""
    light, deep = after_all(SleepCall(1)), after_all(SleepCall(2))
    assert calls_between(light, deep) == (SleepCall(2, tags=("weights", "kv_cache")),)
    assert calls_between(deep, light)[0] == WakeCall()
