"""Pauses: what they do with requests that come, and calls that change nothing but are to abort what is held."""

import pytest

from shuteye.calls import PauseCall, ResumeCall, SleepCall, WakeCall
from shuteye.errors import DrainTimeout, ModelPaused, ModelSleeping
from shuteye.tasks.generate.requests import SamplingParams

PROMPT = tuple(range(3, 40))
LONG = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)


@pytest.mark.parametrize("mode", ["abort", "wait"])
def test_a_pause_that_ends_requests_refuses_new_ones_until_resume(rig, mode):
    """Requests that are held for ever by a pause after which the contract promises 503."""
    expected = rig.generate(PROMPT)
    rig.call(PauseCall(mode))
    assert rig.core.state.refusing
    with pytest.raises(ModelPaused, match="/resume"):
        rig.generate(PROMPT)
    rig.call(WakeCall())
    with pytest.raises(ModelPaused):
        rig.generate(PROMPT)
    rig.call(ResumeCall())
    assert not rig.core.state.refusing
    assert rig.generate(PROMPT) == expected


def test_a_pause_that_waits_refuses_while_it_waits_and_no_longer_if_it_gives_up(rig):
    """A drain that lets in what it will never finish; or one that gave up and refuses all the same."""
    rig.add("running", PROMPT, LONG)
    rig.step()
    answers = rig.submit(PauseCall("wait"))
    rig.step()
    assert not answers
    rig.add("late", PROMPT)
    rig.run()
    assert isinstance(rig.ended["late"], ModelPaused)
    assert rig.ended["running"] == "length"
    rig.call(ResumeCall())
    rig.add("another", PROMPT, LONG)
    rig.step()
    with pytest.raises(DrainTimeout):
        rig.call(PauseCall("wait", 0))
    assert not rig.core.state.refusing
    assert rig.generate(PROMPT)


def test_the_last_pause_decides(rig):
    """A pause that keeps requests, and refuses them because another one did before; or the reverse."""
    rig.call(PauseCall("abort"))
    rig.call(PauseCall("keep"))
    rig.add("held", PROMPT)
    rig.run()
    assert "held" not in rig.ended
    rig.call(PauseCall("wait"))
    assert "held" not in rig.ended, "nothing can finish while paused: what is held stays held"
    with pytest.raises(ModelPaused):
        rig.generate(PROMPT)
    rig.call(ResumeCall())
    rig.run()
    assert rig.ended["held"] == "length"


@pytest.mark.parametrize(
    ("policy", "refusal"), [("reject", ModelSleeping), ("hold", ModelPaused), ("wake", ModelPaused)]
)
def test_asleep_and_paused(make_rig, policy, refusal):
    """A model woken for a request that cannot run then either."""
    rig = make_rig(on_sleeping_request=policy)
    rig.call(PauseCall("abort"))
    rig.call(SleepCall(1))
    with pytest.raises(refusal):
        rig.generate(PROMPT)
    assert rig.core.state.is_sleeping


@pytest.mark.parametrize("again", [PauseCall("abort"), SleepCall(0, mode="abort"), SleepCall(1, mode="abort")])
@pytest.mark.parametrize("first", ["pause", "doze", "sleep"])
def test_abort_ends_what_is_held_even_if_nothing_else_changes(make_rig, first, again):
    """Requests that stay held although the answer of a call with mode=abort has come."""
    rig = make_rig(on_sleeping_request="hold")
    rig.add("kept", PROMPT, LONG)
    rig.step()
    rig.call({"pause": PauseCall("keep"), "doze": SleepCall(0, mode="keep"), "sleep": SleepCall(1, mode="keep")}[first])
    rig.add("held", PROMPT)
    rig.run()
    if first == "sleep" and again == SleepCall(0, mode="abort"):
        return  # a conflict, which touches nothing
    report = rig.call(again)
    assert rig.ended == {"kept": "abort", "held": "abort"}
    if isinstance(again, SleepCall):
        assert report.aborted_requests == 2
        assert report.changed == ((first, again.level) not in {("doze", 0), ("sleep", 1)})


def test_keep_holds_what_is_held(rig):
    """A second call that changes nothing, and loses what the first one kept."""
    rig.call(PauseCall("keep"))
    rig.add("held", PROMPT)
    rig.run()
    rig.call(PauseCall("keep"))
    rig.call(SleepCall(0, mode="keep"))
    assert rig.call(SleepCall(0, mode="keep")).held_requests == 1
    assert "held" not in rig.ended
    rig.call(ResumeCall())
    rig.run()
    assert rig.ended["held"] == "length"
