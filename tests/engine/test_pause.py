"""Pauses: what they do with requests that come, and calls that change nothing but are to abort what is held."""

import pytest

from shuteye.calls import PauseCall, ResumeCall, SleepCall, WakeCall
from shuteye.errors import DrainTimeout, ModelPaused, ModelSleeping
from shuteye.tasks.generate.requests import SamplingParams

PROMPT = tuple(range(3, 40))
LONG = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)


@pytest.mark.parametrize("mode", ["abort", "wait"])
def test_a_pause_that_ends_requests_refuses_new_ones_until_resume(harness, mode):
    """Requests that are held for ever by a pause after which the contract promises 503."""
    expected = harness.generate(PROMPT)
    harness.call(PauseCall(mode))
    assert harness.core.state.refusing
    with pytest.raises(ModelPaused, match="/resume"):
        harness.generate(PROMPT)
    harness.call(WakeCall())
    with pytest.raises(ModelPaused):
        harness.generate(PROMPT)
    harness.call(ResumeCall())
    assert not harness.core.state.refusing
    assert harness.generate(PROMPT) == expected


def test_a_pause_that_waits_refuses_while_it_waits_and_no_longer_if_it_gives_up(harness):
    """A drain that lets in what it will never finish; or one that gave up and refuses all the same."""
    harness.add("running", PROMPT, LONG)
    harness.step()
    answers = harness.submit(PauseCall("wait"))
    harness.step()
    assert not answers
    harness.add("late", PROMPT)
    harness.run()
    assert isinstance(harness.ended["late"], ModelPaused)
    assert harness.ended["running"] == "length"
    harness.call(ResumeCall())
    harness.add("another", PROMPT, LONG)
    harness.step()
    with pytest.raises(DrainTimeout):
        harness.call(PauseCall("wait", 0))
    assert not harness.core.state.refusing
    assert harness.generate(PROMPT)


def test_the_mode_of_the_last_pause_counts(harness):
    """A pause that keeps requests, and refuses them because another one did before; or the reverse."""
    harness.call(PauseCall("abort"))
    harness.call(PauseCall("keep"))
    harness.add("held", PROMPT)
    harness.run()
    assert "held" not in harness.ended
    harness.call(PauseCall("wait"))
    assert "held" not in harness.ended, "nothing can finish while paused: what is held stays held"
    with pytest.raises(ModelPaused):
        harness.generate(PROMPT)
    harness.call(ResumeCall())
    harness.run()
    assert harness.ended["held"] == "length"


@pytest.mark.parametrize(
    ("policy", "refusal"), [("reject", ModelSleeping), ("hold", ModelPaused), ("wake", ModelPaused)]
)
def test_asleep_and_paused(make_harness, policy, refusal):
    """A model woken for a request that cannot run then either."""
    harness = make_harness(on_sleeping_request=policy)
    harness.call(PauseCall("abort"))
    harness.call(SleepCall(1))
    with pytest.raises(refusal):
        harness.generate(PROMPT)
    assert harness.core.state.is_sleeping


@pytest.mark.parametrize("again", [PauseCall("abort"), SleepCall(0, mode="abort"), SleepCall(1, mode="abort")])
@pytest.mark.parametrize("first", ["pause", "doze", "sleep"])
def test_abort_ends_what_is_held_even_if_nothing_else_changes(make_harness, first, again):
    """Requests that stay held although the answer of a call with mode=abort has come."""
    harness = make_harness(on_sleeping_request="hold")
    harness.add("kept", PROMPT, LONG)
    harness.step()
    harness.call(
        {"pause": PauseCall("keep"), "doze": SleepCall(0, mode="keep"), "sleep": SleepCall(1, mode="keep")}[first]
    )
    harness.add("held", PROMPT)
    harness.run()
    if first == "sleep" and again == SleepCall(0, mode="abort"):
        return  # a conflict, which touches nothing
    report = harness.call(again)
    assert harness.ended == {"kept": "abort", "held": "abort"}
    if isinstance(again, SleepCall):
        assert report.aborted_requests == 2
        assert report.changed == ((first, again.level) not in {("doze", 0), ("sleep", 1)})


def test_keep_holds_what_is_held(harness):
    """A second call that changes nothing, and loses what the first one kept."""
    harness.call(PauseCall("keep"))
    harness.add("held", PROMPT)
    harness.run()
    harness.call(PauseCall("keep"))
    harness.call(SleepCall(0, mode="keep"))
    assert harness.call(SleepCall(0, mode="keep")).held_requests == 1
    assert "held" not in harness.ended
    harness.call(ResumeCall())
    harness.run()
    assert harness.ended["held"] == "length"


def test_the_tag_scheduling_lifts_level_0_and_nothing_else(harness):
    """vLLM's tag refused; or one that wakes memory, or lifts somebody's pause."""
    harness.call(SleepCall(0))
    assert harness.call(WakeCall(tags=("scheduling",))).changed
    assert not harness.call(WakeCall(tags=("scheduling",))).changed
    harness.call(PauseCall("keep"))
    harness.call(SleepCall(1))
    assert not harness.call(WakeCall(tags=("scheduling",))).changed
    assert harness.core.state.is_sleeping
    assert harness.call(WakeCall(tags=("scheduling", "weights", "kv_cache"))).changed
    assert (harness.core.state.is_sleeping, harness.core.state.paused) == (False, True)
