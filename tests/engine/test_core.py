"""The engine core over a tiny real model: requests, transitions, and both at once."""

import os
import time
from pathlib import Path

import pytest
import torch
from core_harness import wake_to_wrong_bytes

from shuteye.calls import (
    PauseCall,
    ReloadCall,
    ResetPrefixCacheCall,
    ResumeCall,
    RpcCall,
    SleepCall,
    UpdateCall,
    WakeCall,
)
from shuteye.errors import (
    DrainTimeout,
    EngineFaulted,
    ImageFailure,
    InternalError,
    InvalidRequest,
    ModelSleeping,
    PromptTooLong,
    QueueFull,
    SleepFailed,
    SleepModeDisabled,
    TransitionConflict,
    VerificationFailed,
    WakeFailed,
)
from shuteye.memory.backends.linux import LinuxBackend
from shuteye.memory.backings import DiskBacking
from shuteye.tasks.generate.requests import GenerateRequest, SamplingParams

PROMPT = tuple(range(3, 40))
LONG = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)


def residencies(harness):
    return {tag.tag: tag.residency for tag in harness.core.state.tags}


def reach(harness, weights, kv):
    """Bring a fresh engine core to a cell of the table."""
    match weights:
        case "offloaded":
            harness.call(SleepCall(1, tags=("weights",)))
        case "discarded":
            harness.call(SleepCall(2, tags=("weights",)))
        case "blank":
            harness.call(SleepCall(2))
            harness.call(WakeCall(("weights",)))
    if kv == "discarded" and residencies(harness)["kv_cache"] == "resident":
        harness.call(
            SleepCall(1, tags=("kv_cache",))
            if weights in ("resident", "offloaded")
            else SleepCall(2, tags=("kv_cache",))
        )
    assert residencies(harness) == {"weights": weights, "kv_cache": kv}


@pytest.mark.parametrize("level", [1, 2])
def test_the_same_tokens_after_a_wake(harness, level):
    before = harness.generate(PROMPT)
    report = harness.call(SleepCall(level))
    assert report.changed
    assert harness.core.state.is_sleeping
    assert harness.core.state.level == level
    assert all(tag.resident_bytes == 0 for tag in harness.core.state.tags)
    assert {tag.tag for tag in report.tags if tag.freed_bytes > 0} == {"weights", "kv_cache"}
    wake = harness.call(WakeCall())
    assert wake.changed
    assert wake.canary
    assert wake.verified == "full"
    assert harness.core.state.gate == "open"
    assert harness.generate(PROMPT) == before


def test_stale_prefixes_are_forgotten(harness):
    """Would catch a prefix hit on KV memory that was released: it reads as poison."""
    before = harness.generate(PROMPT)
    assert harness.core.stats.num_prefix_hits_total == 0
    harness.generate(PROMPT)
    hits = harness.core.stats.num_prefix_hits_total
    assert hits > 0
    harness.call(SleepCall(1, tags=("kv_cache",)))
    harness.call(WakeCall())
    assert harness.generate(PROMPT) == before
    assert harness.core.stats.num_prefix_hits_total == hits


def test_sleeping_again_changes_nothing(harness):
    harness.call(SleepCall(1))
    again = harness.call(SleepCall(1))
    assert (again.changed, again.level) == (False, 1)
    assert harness.call(SleepCall(2)).changed
    assert harness.core.state.level == 2
    with pytest.raises(TransitionConflict):
        harness.call(SleepCall(1))
    with pytest.raises(TransitionConflict):
        harness.call(SleepCall(0))


def test_waking_awake_changes_nothing_and_undoes_no_pause(harness):
    assert not harness.call(WakeCall()).changed
    harness.call(PauseCall())
    assert not harness.call(WakeCall()).changed
    assert harness.core.state.paused
    harness.call(SleepCall(1))
    harness.call(WakeCall())
    assert harness.core.state.paused
    assert harness.core.state.gate == "closed"
    harness.call(ResumeCall())
    assert harness.core.state.gate == "open"


def test_resume_while_asleep_is_a_conflict(harness):
    harness.call(SleepCall(1))
    with pytest.raises(TransitionConflict):
        harness.call(ResumeCall())


def test_level_0_is_a_pause_that_wake_up_lifts(harness):
    report = harness.call(SleepCall(0))
    assert (report.changed, report.level, report.freed_bytes) == (True, 0, 0)
    assert not harness.core.state.is_sleeping
    assert harness.core.state.paused
    harness.add("a", PROMPT)
    harness.run()
    assert "a" not in harness.ended
    assert harness.call(WakeCall()).changed
    harness.run()
    assert harness.ended["a"] == "length"


def test_tags_wake_one_at_a_time(harness):
    before = harness.generate(PROMPT)
    harness.call(SleepCall(1))
    harness.call(WakeCall(("kv_cache",)))
    assert residencies(harness) == {"weights": "offloaded", "kv_cache": "resident"}
    assert harness.core.state.gate == "closed"
    harness.call(WakeCall(("weights",)))
    assert harness.core.state.gate == "open"
    assert harness.generate(PROMPT) == before


def tensors_of(harness):
    """The model's tensors by checkpoint name, copied while they are there."""
    return {name: tensor.clone() for name, tensor in harness.tensors().items()}


def test_level_2_serves_nothing_until_every_tensor_is_written(harness):
    """Would catch a partial update opening the gate over blank memory."""
    before = harness.generate(PROMPT)
    tensors = tensors_of(harness)
    harness.call(SleepCall(2))
    harness.call(WakeCall(("weights",)))
    assert residencies(harness)["weights"] == "blank"
    with pytest.raises(TransitionConflict, match="missing"):
        harness.call(WakeCall(("kv_cache",)))
    with pytest.raises(TransitionConflict, match="missing"):
        harness.call(WakeCall())
    last = ("model.norm.weight", tensors.pop("model.norm.weight"))
    report = harness.call(UpdateCall(named_tensors=list(tensors.items())))
    assert report.missing == ("model.norm.weight",)
    assert harness.core.state.missing == report.missing
    with pytest.raises(TransitionConflict, match=report.missing[0]):
        harness.call(WakeCall(("kv_cache",)))
    assert harness.call(UpdateCall(named_tensors=[last])).missing == ()
    harness.call(WakeCall(("kv_cache",)))
    assert harness.core.state.gate == "open"
    assert harness.generate(PROMPT) == before


def test_level_2_then_reload(harness):
    before = harness.generate(PROMPT)
    harness.call(SleepCall(2))
    harness.call(WakeCall(("weights",)))
    assert harness.call(ReloadCall()).missing == ()
    harness.call(WakeCall(("kv_cache",)))
    assert harness.generate(PROMPT) == before


def negated_head(harness):
    name = "model.norm.weight"
    return [(name, -tensors_of(harness)[name])]


def test_updated_weights_survive_level_1_and_not_level_2(harness):
    """Would catch a wake that maps the old image over newer weights, or saves too little."""
    old = harness.generate(PROMPT)
    harness.call(UpdateCall(named_tensors=negated_head(harness)))
    new = harness.generate(PROMPT)
    assert new != old
    first = harness.call(SleepCall(1))
    assert first.tags[0].saved_bytes > 0
    harness.call(WakeCall())
    assert harness.generate(PROMPT) == new
    second = harness.call(SleepCall(1))
    assert second.tags[0].saved_bytes == 0, "weights that were not written again were saved again"
    harness.call(WakeCall())
    assert harness.generate(PROMPT) == new
    harness.call(SleepCall(2))
    harness.call(WakeCall())
    assert harness.generate(PROMPT) == old


def test_an_update_in_flight_recomputes_what_the_old_weights_made(harness):
    """Would catch a request that mixes K/V of old and new weights."""
    harness.add("a", PROMPT, LONG)
    for _ in range(10):
        harness.step()
    so_far = list(harness.tokens["a"])
    assert 0 < len(so_far) < 60
    harness.call(UpdateCall(named_tensors=negated_head(harness)))
    harness.run()
    rest = SamplingParams(temperature=0.0, max_tokens=60 - len(so_far), ignore_eos=True)
    assert harness.tokens["a"] == so_far + harness.generate((*PROMPT, *so_far), rest)


def test_a_bad_update_is_refused_by_name(harness):
    before = harness.generate(PROMPT)
    with pytest.raises(InvalidRequest, match="no_such"):
        harness.call(UpdateCall(named_tensors=[("no_such.weight", torch.zeros(1))]))
    with pytest.raises(InvalidRequest, match="shape"):
        harness.call(UpdateCall(named_tensors=[("model.norm.weight", torch.zeros(1))]))
    assert harness.generate(PROMPT) == before
    harness.call(SleepCall(1))
    with pytest.raises(TransitionConflict):
        harness.call(UpdateCall(named_tensors=[]))


def test_weights_that_make_nonsense_are_noticed(harness):
    name, tensor = negated_head(harness)[0]
    with pytest.raises(Exception, match="canary") as caught:
        harness.call(UpdateCall(named_tensors=[(name, torch.full_like(tensor, float("nan")))]))
    assert type(caught.value).__name__ == "EngineFaulted"
    with pytest.raises(Exception, match="faulted"):
        harness.generate(PROMPT)
    harness.call(WakeCall())
    assert harness.core.state.gate == "open"


def test_a_wake_after_a_fault_says_whether_updates_are_still_there(harness):
    """Would catch weights that were written, are gone, and of which nobody says so."""
    harness.call(UpdateCall(named_tensors=negated_head(harness)))
    harness.core._sleep.fault("on purpose")
    report = harness.call(WakeCall())
    assert report.updates_lost == ("+" not in report.weights_source)
    assert report.updates_lost


# --- requests in flight -------------------------------------------------------------------------


def test_mode_abort_ends_requests_at_once(harness):
    harness.add("a", PROMPT, LONG)
    harness.step()
    report = harness.call(SleepCall(1, mode="abort"))
    assert harness.ended == {"a": "abort"}
    assert report.aborted_requests == 1


def test_mode_wait_finishes_requests_first(harness):
    expected = harness.generate(PROMPT, LONG)
    harness.add("a", PROMPT, LONG)
    harness.step()
    answers = harness.submit(SleepCall(1, mode="wait"))
    harness.step()
    assert harness.core.state.gate == "draining"
    assert answers == []
    harness.add("late", PROMPT)
    harness.run()
    assert harness.tokens["a"] == expected
    assert harness.ended["a"] == "length"
    assert isinstance(harness.ended["late"], ModelSleeping), "a late request kept the drain from ending"
    assert answers[0].changed


def test_mode_wait_gives_up_at_its_deadline(harness):
    harness.add("a", PROMPT, LONG)
    harness.step()
    with pytest.raises(DrainTimeout):
        harness.call(SleepCall(1, mode="wait", timeout_s=0.0))
    assert harness.core.state.gate == "open"
    harness.run()
    assert harness.ended["a"] == "length"


def test_mode_keep_goes_on_where_it_was(harness):
    expected = harness.generate(PROMPT, LONG)
    seeded = SamplingParams(temperature=1.0, seed=7, max_tokens=40, ignore_eos=True)
    expected_seeded = harness.generate(PROMPT, seeded)
    harness.add("a", PROMPT, LONG)
    harness.add("b", PROMPT, seeded)
    for _ in range(7):
        harness.step()
    report = harness.call(SleepCall(1, mode="keep"))
    assert report.held_requests == 2
    harness.run()
    assert not {"a", "b"} & harness.ended.keys()
    harness.call(WakeCall())
    harness.run()
    assert harness.tokens["a"] == expected
    assert harness.tokens["b"] == expected_seeded


def test_policy_reject(harness):
    harness.call(SleepCall(1))
    with pytest.raises(ModelSleeping):
        harness.generate(PROMPT)


def test_policy_hold_waits_for_a_wake(make_harness):
    harness = make_harness(on_sleeping_request="hold", hold_queue_size=1)
    expected = harness.generate(PROMPT)
    harness.call(SleepCall(1))
    harness.add("a", PROMPT)
    with pytest.raises(QueueFull):
        harness.generate(PROMPT)
    harness.call(WakeCall())
    harness.run()
    assert harness.tokens["a"] == expected


def test_policy_hold_has_a_deadline(make_harness):
    harness = make_harness(on_sleeping_request="hold", hold_timeout_s=0.02)
    harness.call(SleepCall(1))
    harness.add("a", PROMPT)
    harness.step()
    assert harness.core.next_deadline is not None
    time.sleep(0.03)
    harness.step()
    assert isinstance(harness.ended["a"], ModelSleeping)
    assert harness.core.next_deadline is None


def test_policy_wake_wakes_once(make_harness):
    harness = make_harness(on_sleeping_request="wake")
    expected = harness.generate(PROMPT)
    harness.call(SleepCall(1))
    harness.backend.clear()
    for name in "abc":
        harness.add(name, PROMPT)
    harness.run()
    assert [harness.tokens[name] for name in "abc"] == [expected] * 3
    assert harness.backend.steps.count("commit") == 1


def count_passes(harness, monkeypatch):
    """How many tokens each pass of the model has, from now on."""
    passes = []
    forward = harness.worker._model.forward

    def counted(batch, kv_cache):
        passes.append(len(batch.input_ids))
        return forward(batch, kv_cache)

    monkeypatch.setattr(harness.worker._model, "forward", counted)
    return passes


def test_policy_wake_reads_the_weights_once_for_canary_and_first_step(make_harness, monkeypatch):
    """Would catch a canary that runs twice, never, or again with later steps."""
    harness = make_harness(on_sleeping_request="wake")
    expected = harness.generate(PROMPT)
    harness.call(SleepCall(1))
    passes = count_passes(harness, monkeypatch)
    assert harness.generate(PROMPT) == expected
    assert passes == [len(PROMPT) + 2] + [1] * (len(expected) - 1)


@pytest.mark.parametrize(("repeat", "kernels"), [(2, "auto"), (1, "torch")])
def test_policy_wake_runs_the_canary_by_itself_where_it_would_round_otherwise(
    make_harness, monkeypatch, repeat, kernels
):
    """Would catch false alarms: a long step, or one without native kernels, adds up in another order."""
    harness = make_harness(on_sleeping_request="wake", kernels=kernels)
    prompt = PROMPT * repeat
    expected = harness.generate(prompt)
    harness.call(SleepCall(1))
    passes = count_passes(harness, monkeypatch)
    assert harness.generate(prompt) == expected
    assert passes == [2, len(prompt)] + [1] * (len(expected) - 1)


@pytest.mark.parametrize("repeat", [1, 2], ids=["shared step", "step of its own"])
def test_a_canary_that_disagrees_with_the_first_step_fails_its_requests(make_harness, repeat):
    """Would catch tokens of wrong weights: requests fail, nothing is served, and only a whole recovery helps."""
    harness = make_harness(on_sleeping_request="wake")
    expected = harness.generate(PROMPT)
    harness.call(SleepCall(1))
    frequencies = harness.worker._model.decoder._loop._frequencies
    frequencies *= 1.5
    harness.add("a", PROMPT * repeat)
    harness.run()
    assert isinstance(harness.ended["a"], VerificationFailed)
    assert harness.tokens["a"] == []
    assert "canary" in harness.core.state.faulted
    harness.add("b", PROMPT)
    harness.run()
    assert isinstance(harness.ended["b"], EngineFaulted)
    with pytest.raises(VerificationFailed, match="canary"):
        harness.call(WakeCall())
    frequencies /= 1.5
    assert harness.call(WakeCall()).verified == "full"
    assert harness.generate(PROMPT) == expected


def test_a_canary_deferred_to_a_step_that_never_came_runs_later(make_harness, monkeypatch):
    harness = make_harness(on_sleeping_request="wake")
    expected = harness.generate(PROMPT)
    harness.call(SleepCall(1))
    harness.add("a", PROMPT)
    harness.submit(PauseCall("keep"))
    harness.run()
    harness.core.abort(["a"])
    harness.call(ResumeCall())
    passes = count_passes(harness, monkeypatch)
    assert harness.generate(PROMPT) == expected
    assert passes[0] == len(PROMPT) + 2


def test_policy_wake_tells_those_who_wait_when_it_fails(make_harness):
    harness = make_harness(on_sleeping_request="wake")
    expected = harness.generate(PROMPT)
    harness.call(SleepCall(1))
    harness.backend.fail_next("commit")
    harness.add("a", PROMPT)
    harness.run()
    assert isinstance(harness.ended["a"], WakeFailed)
    assert harness.generate(PROMPT) == expected, "the next request must try again"


def test_policy_wake_over_blank_weights_is_asleep_not_a_conflict(make_harness):
    harness = make_harness(on_sleeping_request="wake")
    reach(harness, "blank", "discarded")
    with pytest.raises(ModelSleeping):
        harness.generate(PROMPT)


def test_a_pause_holds_requests_for_resume(harness):
    expected = harness.generate(PROMPT)
    harness.call(PauseCall("keep"))
    harness.add("a", PROMPT)
    harness.run()
    assert "a" not in harness.ended
    harness.call(ResumeCall())
    harness.run()
    assert harness.tokens["a"] == expected


def test_calls_are_served_in_order(harness):
    """Would catch a wake overtaking the sleep that it was meant to end."""
    harness.add("a", PROMPT, LONG)
    harness.step()
    sleep, wake = harness.submit(SleepCall(1, mode="wait")), harness.submit(WakeCall())
    harness.run()
    assert (sleep[0].changed, wake[0].changed) == (True, True)
    assert harness.core.state.gate == "open"


def test_requests_that_never_fit_are_refused_in_every_state(harness):
    too_long = tuple(range(1, 256)) + tuple(range(1, 20))
    with pytest.raises(PromptTooLong):
        harness.generate(too_long)
    harness.call(PauseCall())
    with pytest.raises(PromptTooLong):
        harness.generate(too_long)


@pytest.mark.parametrize("call", [SleepCall(), WakeCall()])
def test_sleep_mode_must_be_asked_for(make_harness, call):
    harness = make_harness(enable_sleep_mode=False)
    with pytest.raises(SleepModeDisabled):
        harness.call(call)
    harness.call(ResetPrefixCacheCall())


@pytest.mark.parametrize(
    "call", [SleepCall(3), SleepCall(1, tags=()), SleepCall(1, tags=("x",)), SleepCall(1, mode="x")]
)
def test_bad_arguments_touch_nothing(harness, call):
    harness.add("a", PROMPT, LONG)
    harness.step()
    harness.backend.clear()
    with pytest.raises(InvalidRequest):
        harness.call(call)
    assert harness.backend.steps == []
    harness.run()
    assert harness.ended["a"] == "length"


def test_no_room_to_save_aborts_nothing(harness, monkeypatch):
    """Would catch requests aborted for a sleep that could have been known to fail."""
    harness.call(UpdateCall(named_tensors=negated_head(harness)))
    monkeypatch.setattr(DiskBacking, "free_bytes", lambda _self: 0)
    harness.add("a", PROMPT, LONG)
    harness.step()
    with pytest.raises(SleepFailed):
        harness.call(SleepCall(1))
    harness.run()
    assert harness.ended["a"] == "length"


def test_a_wake_that_outlasts_the_deadline_still_serves(make_harness, monkeypatch):
    """Would catch requests refused as asleep in the very step in which the model woke for them."""
    harness = make_harness(on_sleeping_request="wake", hold_timeout_s=0.05)
    expected = harness.generate(PROMPT)
    harness.call(SleepCall(1))
    wake = harness.core._sleep.wake

    def slow(tags, **options):
        time.sleep(0.1)
        return wake(tags, **options)

    monkeypatch.setattr(harness.core._sleep, "wake", slow)
    harness.add("a", PROMPT)
    harness.run()
    assert harness.tokens["a"] == expected


def test_policy_wake_does_not_rely_on_a_wake_of_only_one_tag(make_harness):
    harness = make_harness(on_sleeping_request="wake")
    expected = harness.generate(PROMPT)
    harness.call(SleepCall(1))
    harness.submit(WakeCall(("kv_cache",)))
    harness.add("a", PROMPT)
    harness.run()
    assert harness.tokens["a"] == expected


def test_what_a_wake_lets_in_is_drained_by_the_sleep_behind_it(make_harness):
    """Would catch held requests that a wake and a sleep in one go leave held, with nothing left to wake them."""
    harness = make_harness(on_sleeping_request="wake")
    expected = harness.generate(PROMPT)
    harness.call(SleepCall(1))
    harness.add("a", PROMPT)
    harness.submit(SleepCall(1, mode="wait"))
    harness.run()
    assert harness.tokens["a"] == expected
    assert harness.core.state.is_sleeping


def test_a_held_id_is_in_use(make_harness):
    """Would catch a request that is lost because another took its name while both were held."""
    harness = make_harness(on_sleeping_request="hold")
    harness.call(SleepCall(1))
    harness.add("a", PROMPT)
    with pytest.raises(InvalidRequest, match="in use"):
        harness.core._held.add(GenerateRequest("a", PROMPT), deadline=None)
    harness.call(WakeCall())
    harness.run()
    assert harness.ended["a"] == "length"


@pytest.mark.parametrize("timeout_s", ["5", float("nan"), -1.0, True])
@pytest.mark.parametrize("call", [SleepCall, PauseCall])
def test_a_deadline_is_a_number_of_seconds(harness, call, timeout_s):
    """Would catch a drain that never ends, or an engine that does."""
    with pytest.raises(InvalidRequest, match="timeout_s"):
        harness.call(call(mode="wait", timeout_s=timeout_s))
    assert harness.core.state.gate == "open"


# --- trust --------------------------------------------------------------------------------------


def test_a_corrupted_saved_extent_is_found_and_nothing_opens(harness):
    harness.call(UpdateCall(named_tensors=negated_head(harness)))
    harness.call(SleepCall(1))
    corrupt_saved(harness)
    with pytest.raises(VerificationFailed, match="checksum"):
        harness.call(WakeCall())
    assert residencies(harness) == {"weights": "offloaded", "kv_cache": "discarded"}
    with pytest.raises(ModelSleeping):
        harness.generate(PROMPT)
    harness.call(SleepCall(2))
    harness.call(WakeCall())
    assert harness.core.state.gate == "open"


def corrupt_saved(harness):
    """Flip bits in what the disk backing holds, behind the engine's back."""
    fd = harness.core._executor._worker.residency._backing._fd
    size = os.fstat(fd).st_size
    data = os.pread(fd, size, 0)
    os.pwrite(fd, bytes(byte ^ 0xFF for byte in data), 0)


def test_the_canary_notices_a_lost_buffer(harness):
    """Rotary frequencies live outside the arena, where no checksum looks."""
    harness.call(SleepCall(1))
    frequencies = harness.worker._model.decoder._loop._frequencies
    frequencies *= 1.5
    with pytest.raises(VerificationFailed, match="canary"):
        harness.call(WakeCall())
    assert harness.core.state.is_sleeping
    frequencies /= 1.5
    harness.call(WakeCall())
    assert harness.core.state.gate == "open"


def test_addresses_never_change(harness):
    pointers = [tensor.data_ptr() for tensor in harness.tensors().values()]
    for level in (1, 2):
        harness.call(SleepCall(level))
        harness.call(WakeCall())
    assert [tensor.data_ptr() for tensor in harness.tensors().values()] == pointers


def test_collective_rpc_reaches_the_worker(harness):
    assert harness.call(RpcCall("missing")) == [()]


@pytest.mark.parametrize("verify", ["off", "sample"])
def test_distrust_outlasts_a_failed_wake(make_harness, monkeypatch, verify):
    """Would catch a retry that looks elsewhere, or nowhere, and opens the gate over memory known to be wrong."""
    monkeypatch.setattr("shuteye.memory.weights.SAMPLE_BYTES", 1)
    harness = make_harness(verify_wake=verify, canary=False)
    harness.call(UpdateCall(named_tensors=list(tensors_of(harness).items())))
    harness.backend.fail_next("release", when="after")
    with pytest.raises(EngineFaulted):
        harness.call(SleepCall(1))
    corrupt_saved(harness)
    for _ in range(3):
        with pytest.raises(VerificationFailed):
            harness.call(WakeCall())
    harness.call(SleepCall(2))
    assert harness.call(WakeCall()).verified == "full"
    harness.call(SleepCall(1))
    assert harness.call(WakeCall()).verified == verify


def verified_modes(harness, monkeypatch):
    """How much each verification from now on compares."""
    modes, verify = [], harness.worker.residency.verify
    monkeypatch.setattr(harness.worker.residency, "verify", lambda mode: modes.append(mode) or verify(mode))
    return modes


def test_a_sample_that_was_wrong_is_followed_by_everything(make_harness, monkeypatch):
    """Would catch a retry whose sample lies elsewhere, and which opens the gate over the extent that was wrong."""
    harness = make_harness(verify_wake="sample")
    harness.call(SleepCall(1))
    wake_to_wrong_bytes(harness, monkeypatch)
    assert not harness.core.state.faulted
    assert harness.call(WakeCall()).verified == "full"


@pytest.mark.parametrize("verify", ["off", "sample"])
@pytest.mark.parametrize("way", ["wake", "reload"])
def test_only_a_full_verification_ends_distrust(make_harness, monkeypatch, verify, way):
    """Would catch weights that are trusted again because a sample of them, or nothing, was compared."""
    harness = make_harness(verify_wake=verify, canary=False)
    modes = verified_modes(harness, monkeypatch)
    harness.backend.fail_next("release", when="after")
    with pytest.raises(EngineFaulted):
        harness.call(SleepCall(1))
    harness.backend.available = 0
    with pytest.raises(WakeFailed):
        harness.call(WakeCall())  # it got as far as releasing: no fault any more, and yet nothing was compared
    harness.backend.available = None
    assert harness.core.state.faulted is None
    if way == "reload":
        harness.call(SleepCall(2))
        harness.call(WakeCall(("weights",)))
        harness.call(ReloadCall())
        harness.call(WakeCall())
    else:
        harness.call(WakeCall(("kv_cache",)))
        assert modes == []
        harness.call(WakeCall(("weights",)))
    assert modes == ["full"]
    harness.call(SleepCall(1))
    harness.call(WakeCall())
    assert modes == ["full"] + (["sample"] if verify == "sample" else [])


def test_an_update_that_breaks_off_is_checked_all_the_same(harness):
    """Would catch nonsense, written before the tensor that was refused, being served."""
    name, tensor = negated_head(harness)[0]
    bad = [(name, torch.full_like(tensor, float("nan"))), ("no_such.weight", tensor)]
    with pytest.raises(EngineFaulted, match="canary"):
        harness.call(UpdateCall(named_tensors=bad))
    with pytest.raises(EngineFaulted):
        harness.generate(PROMPT)


def test_an_update_that_writes_nothing_changes_no_version(harness):
    """Would catch a report of updated weights where none were, and a canary that forgot what it knew."""
    before = harness.call(RpcCall("weights_source"))
    with pytest.raises(InvalidRequest):
        harness.call(UpdateCall(named_tensors=[("no_such.weight", torch.zeros(1))]))
    harness.call(UpdateCall(named_tensors=[]))
    assert harness.call(RpcCall("weights_source")) == before


def test_canary_logits_of_superseded_weights_are_dropped(harness):
    """Would catch a worker that grows with every update."""
    for _ in range(3):
        harness.call(UpdateCall(named_tensors=negated_head(harness)))
        harness.call(SleepCall(2))
        harness.call(WakeCall())
    assert len(harness.core._executor._worker._canary._recorded) == 1


def damage(image_dir):
    """Flip one bit in the middle of an image's weights, as a failing disk would."""
    weights = next(image_dir.glob("weights*.bin"))
    weights.chmod(0o644)
    with weights.open("r+b") as file:
        file.seek(weights.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def test_a_damaged_image_is_refused_at_the_start(make_harness, tmp_path):
    """Would catch wrong tokens after a restart: the canary alone would record the damage as good."""
    image_dir = Path(make_harness(cache_dir=tmp_path).core.info.image_dir)
    damage(image_dir)
    with pytest.raises(ImageFailure, match=f"shuteye images rm {image_dir.name}"):
        make_harness(cache_dir=tmp_path)


def test_a_damaged_image_is_not_reloaded(make_harness, tmp_path):
    harness = make_harness(cache_dir=tmp_path)
    damage(Path(harness.core.info.image_dir))
    with pytest.raises(EngineFaulted, match="checksums"):
        harness.call(ReloadCall())
    with pytest.raises(EngineFaulted):
        harness.generate(PROMPT)


def test_a_fault_is_recovered_wholly_even_if_a_part_was_asked_for(harness):
    """Would catch blank weights mapped in the course of a recovery."""
    before = harness.generate(PROMPT)
    harness.backend.fail_next("release", when="after")
    with pytest.raises(EngineFaulted):
        harness.call(SleepCall(2))
    harness.call(WakeCall(("weights",)))
    assert harness.core.state.gate == "open"
    assert harness.generate(PROMPT) == before


@pytest.mark.parametrize("mode", ["abort", "keep", "wait"])
def test_a_sleep_that_cannot_save_costs_no_request(harness, mode):
    expected = harness.generate(PROMPT, LONG)
    harness.call(UpdateCall(named_tensors=list(tensors_of(harness).items())))
    harness.add("a", PROMPT, LONG)
    harness.step()
    harness.backend.fail_next("write_file")
    with pytest.raises(SleepFailed):
        harness.call(SleepCall(1, mode=mode))
    harness.run()
    assert harness.tokens["a"] == expected


@pytest.mark.parametrize("level", [1, 2])
def test_a_wake_from_a_deeper_level_lifts_level_0_too(harness, level):
    """Would catch a model that is awake, and yet dozes at the level it was at before."""
    before = harness.generate(PROMPT)
    harness.call(SleepCall(0))
    harness.call(SleepCall(level))
    harness.call(WakeCall())
    assert (harness.core.state.gate, harness.core.state.level) == ("open", None)
    assert harness.generate(PROMPT) == before


def test_a_sleep_without_room_is_refused_before_anybody_is_waited_for(harness, monkeypatch):
    """Would catch requests that are drained, or new ones refused, for a sleep that could never succeed."""
    expected = harness.generate(PROMPT, LONG)
    harness.call(UpdateCall(named_tensors=list(tensors_of(harness).items())))
    monkeypatch.setattr(harness.worker.residency._backing, "free_bytes", lambda: 0)
    harness.add("a", PROMPT, LONG)
    harness.step()
    with pytest.raises(SleepFailed, match="nothing was touched"):
        harness.call(SleepCall(1, mode="wait"))
    assert "a" not in harness.ended
    harness.run()
    assert harness.tokens["a"] == expected


def test_the_report_and_the_state_agree_on_the_level(harness):
    assert harness.call(SleepCall(2, tags=("kv_cache",))).level == harness.core.state.level == 1


def test_the_state_counts_kv_memory_as_requests_touch_it(make_harness):
    harness = make_harness(backend=LinuxBackend())  # the fake one touches everything to poison it
    harness.call(SleepCall(1, tags=("kv_cache",)))
    harness.call(WakeCall())
    touched = [next(tag.resident_bytes for tag in harness.core.state.tags if tag.tag == "kv_cache")]
    harness.generate(PROMPT)
    touched.append(next(tag.resident_bytes for tag in harness.core.state.tags if tag.tag == "kv_cache"))
    assert touched[0] < touched[1]


def test_a_surprise_while_adding_costs_that_request_alone(harness, monkeypatch):
    """A bug in how one request is taken in ending the engine for everybody, or half a request staying behind."""
    scheduler = harness.core._scheduler
    add = scheduler.add

    def surprising(request):
        add(request)
        if request.request_id == "strange":
            raise ZeroDivisionError("a bug")

    monkeypatch.setattr(scheduler, "add", surprising)
    harness.add("plain", PROMPT)
    harness.add("strange", PROMPT)
    harness.run()
    assert harness.ended["plain"] == "length"
    assert isinstance(harness.ended["strange"], InternalError)
    assert harness.core.stats.num_waiting == harness.core.stats.num_running == 0


def test_the_number_of_waiting_requests_is_bounded(make_harness):
    """A queue that grows for as long as requests come faster than they are served."""
    harness = make_harness(max_num_seqs=1, max_waiting_requests=2)
    harness.add("runs", PROMPT)
    harness.step()
    for name in ("waits", "waits too", "refused"):
        harness.add(name, PROMPT)
    harness.run()
    assert isinstance(harness.ended.pop("refused"), QueueFull)
    assert set(harness.ended.values()) == {"length"}
