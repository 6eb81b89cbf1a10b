"""The engine core over a tiny real model: requests, transitions, and both at once."""

import os
import time
from pathlib import Path

import pytest
import torch
from rigs import wake_to_wrong_bytes

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


def residencies(rig):
    return {tag.tag: tag.residency for tag in rig.core.state.tags}


def reach(rig, weights, kv):
    """Bring a fresh rig to a cell of the table."""
    match weights:
        case "offloaded":
            rig.call(SleepCall(1, tags=("weights",)))
        case "discarded":
            rig.call(SleepCall(2, tags=("weights",)))
        case "blank":
            rig.call(SleepCall(2))
            rig.call(WakeCall(("weights",)))
    if kv == "discarded" and residencies(rig)["kv_cache"] == "resident":
        rig.call(
            SleepCall(1, tags=("kv_cache",))
            if weights in ("resident", "offloaded")
            else SleepCall(2, tags=("kv_cache",))
        )
    assert residencies(rig) == {"weights": weights, "kv_cache": kv}


@pytest.mark.parametrize("level", [1, 2])
def test_the_same_tokens_after_a_wake(rig, level):
    before = rig.generate(PROMPT)
    report = rig.call(SleepCall(level))
    assert report.changed
    assert rig.core.state.is_sleeping
    assert rig.core.state.level == level
    assert all(tag.resident_bytes == 0 for tag in rig.core.state.tags)
    assert {tag.tag for tag in report.tags if tag.freed_bytes > 0} == {"weights", "kv_cache"}
    wake = rig.call(WakeCall())
    assert wake.changed
    assert wake.canary
    assert wake.verified == "full"
    assert rig.core.state.gate == "open"
    assert rig.generate(PROMPT) == before


def test_stale_prefixes_are_forgotten(rig):
    """Would catch a prefix hit on KV memory that was released: it reads as poison."""
    before = rig.generate(PROMPT)
    assert rig.core.stats.num_prefix_hits_total == 0
    rig.generate(PROMPT)
    hits = rig.core.stats.num_prefix_hits_total
    assert hits > 0
    rig.call(SleepCall(1, tags=("kv_cache",)))
    rig.call(WakeCall())
    assert rig.generate(PROMPT) == before
    assert rig.core.stats.num_prefix_hits_total == hits


def test_sleeping_again_changes_nothing(rig):
    rig.call(SleepCall(1))
    again = rig.call(SleepCall(1))
    assert (again.changed, again.level) == (False, 1)
    assert rig.call(SleepCall(2)).changed
    assert rig.core.state.level == 2
    with pytest.raises(TransitionConflict):
        rig.call(SleepCall(1))
    with pytest.raises(TransitionConflict):
        rig.call(SleepCall(0))


def test_waking_awake_changes_nothing_and_undoes_no_pause(rig):
    assert not rig.call(WakeCall()).changed
    rig.call(PauseCall())
    assert not rig.call(WakeCall()).changed
    assert rig.core.state.paused
    rig.call(SleepCall(1))
    rig.call(WakeCall())
    assert rig.core.state.paused
    assert rig.core.state.gate == "closed"
    rig.call(ResumeCall())
    assert rig.core.state.gate == "open"


def test_resume_while_asleep_is_a_conflict(rig):
    rig.call(SleepCall(1))
    with pytest.raises(TransitionConflict):
        rig.call(ResumeCall())


def test_level_0_is_a_pause_that_wake_up_lifts(rig):
    report = rig.call(SleepCall(0))
    assert (report.changed, report.level, report.freed_bytes) == (True, 0, 0)
    assert not rig.core.state.is_sleeping
    assert rig.core.state.paused
    rig.add("a", PROMPT)
    rig.run()
    assert "a" not in rig.ended
    assert rig.call(WakeCall()).changed
    rig.run()
    assert rig.ended["a"] == "length"


def test_tags_wake_one_at_a_time(rig):
    before = rig.generate(PROMPT)
    rig.call(SleepCall(1))
    rig.call(WakeCall(("kv_cache",)))
    assert residencies(rig) == {"weights": "offloaded", "kv_cache": "resident"}
    assert rig.core.state.gate == "closed"
    rig.call(WakeCall(("weights",)))
    assert rig.core.state.gate == "open"
    assert rig.generate(PROMPT) == before


def tensors_of(rig):
    """The model's tensors by checkpoint name, copied while they are there."""
    return {name: tensor.clone() for name, tensor in rig.tensors().items()}


def test_level_2_serves_nothing_until_every_tensor_is_written(rig):
    """Would catch a partial update opening the gate over blank memory."""
    before = rig.generate(PROMPT)
    tensors = tensors_of(rig)
    rig.call(SleepCall(2))
    rig.call(WakeCall(("weights",)))
    assert residencies(rig)["weights"] == "blank"
    with pytest.raises(TransitionConflict, match="missing"):
        rig.call(WakeCall(("kv_cache",)))
    with pytest.raises(TransitionConflict, match="missing"):
        rig.call(WakeCall())
    last = ("model.norm.weight", tensors.pop("model.norm.weight"))
    report = rig.call(UpdateCall(named_tensors=list(tensors.items())))
    assert report.missing == ("model.norm.weight",)
    assert rig.core.state.missing == report.missing
    with pytest.raises(TransitionConflict, match=report.missing[0]):
        rig.call(WakeCall(("kv_cache",)))
    assert rig.call(UpdateCall(named_tensors=[last])).missing == ()
    rig.call(WakeCall(("kv_cache",)))
    assert rig.core.state.gate == "open"
    assert rig.generate(PROMPT) == before


def test_level_2_then_reload(rig):
    before = rig.generate(PROMPT)
    rig.call(SleepCall(2))
    rig.call(WakeCall(("weights",)))
    assert rig.call(ReloadCall()).missing == ()
    rig.call(WakeCall(("kv_cache",)))
    assert rig.generate(PROMPT) == before


def negated_head(rig):
    name = "model.norm.weight"
    return [(name, -tensors_of(rig)[name])]


def test_updated_weights_survive_level_1_and_not_level_2(rig):
    """Would catch a wake that maps the old image over newer weights, or saves too little."""
    old = rig.generate(PROMPT)
    rig.call(UpdateCall(named_tensors=negated_head(rig)))
    new = rig.generate(PROMPT)
    assert new != old
    first = rig.call(SleepCall(1))
    assert first.tags[0].saved_bytes > 0
    rig.call(WakeCall())
    assert rig.generate(PROMPT) == new
    second = rig.call(SleepCall(1))
    assert second.tags[0].saved_bytes == 0, "weights that were not written again were saved again"
    rig.call(WakeCall())
    assert rig.generate(PROMPT) == new
    rig.call(SleepCall(2))
    rig.call(WakeCall())
    assert rig.generate(PROMPT) == old


def test_an_update_in_flight_recomputes_what_the_old_weights_made(rig):
    """Would catch a request that mixes K/V of old and new weights."""
    rig.add("a", PROMPT, LONG)
    for _ in range(10):
        rig.step()
    so_far = list(rig.tokens["a"])
    assert 0 < len(so_far) < 60
    rig.call(UpdateCall(named_tensors=negated_head(rig)))
    rig.run()
    rest = SamplingParams(temperature=0.0, max_tokens=60 - len(so_far), ignore_eos=True)
    assert rig.tokens["a"] == so_far + rig.generate((*PROMPT, *so_far), rest)


def test_a_bad_update_is_refused_by_name(rig):
    before = rig.generate(PROMPT)
    with pytest.raises(InvalidRequest, match="no_such"):
        rig.call(UpdateCall(named_tensors=[("no_such.weight", torch.zeros(1))]))
    with pytest.raises(InvalidRequest, match="shape"):
        rig.call(UpdateCall(named_tensors=[("model.norm.weight", torch.zeros(1))]))
    assert rig.generate(PROMPT) == before
    rig.call(SleepCall(1))
    with pytest.raises(TransitionConflict):
        rig.call(UpdateCall(named_tensors=[]))


def test_weights_that_make_nonsense_are_noticed(rig):
    name, tensor = negated_head(rig)[0]
    with pytest.raises(Exception, match="canary") as caught:
        rig.call(UpdateCall(named_tensors=[(name, torch.full_like(tensor, float("nan")))]))
    assert type(caught.value).__name__ == "EngineFaulted"
    with pytest.raises(Exception, match="faulted"):
        rig.generate(PROMPT)
    rig.call(WakeCall())
    assert rig.core.state.gate == "open"


# --- requests in flight -------------------------------------------------------------------------


def test_mode_abort_ends_requests_at_once(rig):
    rig.add("a", PROMPT, LONG)
    rig.step()
    report = rig.call(SleepCall(1, mode="abort"))
    assert rig.ended == {"a": "abort"}
    assert report.aborted_requests == 1


def test_mode_wait_finishes_requests_first(rig):
    expected = rig.generate(PROMPT, LONG)
    rig.add("a", PROMPT, LONG)
    rig.step()
    answers = rig.submit(SleepCall(1, mode="wait"))
    rig.step()
    assert rig.core.state.gate == "draining"
    assert answers == []
    rig.add("late", PROMPT)
    rig.run()
    assert rig.tokens["a"] == expected
    assert rig.ended["a"] == "length"
    assert isinstance(rig.ended["late"], ModelSleeping), "a late request kept the drain from ending"
    assert answers[0].changed


def test_mode_wait_gives_up_at_its_deadline(rig):
    rig.add("a", PROMPT, LONG)
    rig.step()
    with pytest.raises(DrainTimeout):
        rig.call(SleepCall(1, mode="wait", timeout_s=0.0))
    assert rig.core.state.gate == "open"
    rig.run()
    assert rig.ended["a"] == "length"


def test_mode_keep_goes_on_where_it_was(rig):
    expected = rig.generate(PROMPT, LONG)
    seeded = SamplingParams(temperature=1.0, seed=7, max_tokens=40, ignore_eos=True)
    expected_seeded = rig.generate(PROMPT, seeded)
    rig.add("a", PROMPT, LONG)
    rig.add("b", PROMPT, seeded)
    for _ in range(7):
        rig.step()
    report = rig.call(SleepCall(1, mode="keep"))
    assert report.held_requests == 2
    rig.run()
    assert not {"a", "b"} & rig.ended.keys()
    rig.call(WakeCall())
    rig.run()
    assert rig.tokens["a"] == expected
    assert rig.tokens["b"] == expected_seeded


def test_policy_reject(rig):
    rig.call(SleepCall(1))
    with pytest.raises(ModelSleeping):
        rig.generate(PROMPT)


def test_policy_hold_waits_for_a_wake(make_rig):
    rig = make_rig(on_sleeping_request="hold", hold_queue_size=1)
    expected = rig.generate(PROMPT)
    rig.call(SleepCall(1))
    rig.add("a", PROMPT)
    with pytest.raises(QueueFull):
        rig.generate(PROMPT)
    rig.call(WakeCall())
    rig.run()
    assert rig.tokens["a"] == expected


def test_policy_hold_has_a_deadline(make_rig):
    rig = make_rig(on_sleeping_request="hold", hold_timeout_s=0.02)
    rig.call(SleepCall(1))
    rig.add("a", PROMPT)
    rig.step()
    assert rig.core.next_deadline is not None
    time.sleep(0.03)
    rig.step()
    assert isinstance(rig.ended["a"], ModelSleeping)
    assert rig.core.next_deadline is None


def test_policy_wake_wakes_once(make_rig):
    rig = make_rig(on_sleeping_request="wake")
    expected = rig.generate(PROMPT)
    rig.call(SleepCall(1))
    rig.backend.clear()
    for name in "abc":
        rig.add(name, PROMPT)
    rig.run()
    assert [rig.tokens[name] for name in "abc"] == [expected] * 3
    assert rig.backend.steps.count("commit") == 1


def count_passes(rig, monkeypatch):
    """How many tokens each pass of the model has, from now on."""
    passes = []
    forward = rig.worker._model.forward

    def counted(batch, kv_cache):
        passes.append(len(batch.input_ids))
        return forward(batch, kv_cache)

    monkeypatch.setattr(rig.worker._model, "forward", counted)
    return passes


def test_policy_wake_reads_the_weights_once_for_canary_and_first_step(make_rig, monkeypatch):
    """Would catch a canary that runs twice, never, or again with later steps."""
    rig = make_rig(on_sleeping_request="wake")
    expected = rig.generate(PROMPT)
    rig.call(SleepCall(1))
    passes = count_passes(rig, monkeypatch)
    assert rig.generate(PROMPT) == expected
    assert passes == [len(PROMPT) + 8] + [1] * (len(expected) - 1)


@pytest.mark.parametrize(("repeat", "kernels"), [(2, "auto"), (1, "torch")])
def test_policy_wake_runs_the_canary_by_itself_where_it_would_round_otherwise(make_rig, monkeypatch, repeat, kernels):
    """Would catch false alarms: a long step, or one without native kernels, adds up in another order."""
    rig = make_rig(on_sleeping_request="wake", kernels=kernels)
    prompt = PROMPT * repeat
    expected = rig.generate(prompt)
    rig.call(SleepCall(1))
    passes = count_passes(rig, monkeypatch)
    assert rig.generate(prompt) == expected
    assert passes == [8, len(prompt)] + [1] * (len(expected) - 1)


@pytest.mark.parametrize("repeat", [1, 2], ids=["shared step", "step of its own"])
def test_a_canary_that_disagrees_with_the_first_step_lets_nothing_out(make_rig, repeat):
    """Would catch tokens of wrong weights: requests fail, nothing is served, and only a whole recovery helps."""
    rig = make_rig(on_sleeping_request="wake")
    expected = rig.generate(PROMPT)
    rig.call(SleepCall(1))
    frequencies = rig.worker._model.decoder.inverse_frequencies
    frequencies.mul_(1.5)
    rig.add("a", PROMPT * repeat)
    rig.run()
    assert isinstance(rig.ended["a"], VerificationFailed)
    assert rig.tokens["a"] == []
    assert "canary" in rig.core.state.faulted
    rig.add("b", PROMPT)
    rig.run()
    assert isinstance(rig.ended["b"], EngineFaulted)
    with pytest.raises(VerificationFailed, match="canary"):
        rig.call(WakeCall())
    frequencies.div_(1.5)
    assert rig.call(WakeCall()).verified == "full"
    assert rig.generate(PROMPT) == expected


def test_a_first_step_that_never_came_is_proven_later(make_rig, monkeypatch):
    rig = make_rig(on_sleeping_request="wake")
    expected = rig.generate(PROMPT)
    rig.call(SleepCall(1))
    rig.add("a", PROMPT)
    rig.submit(PauseCall("keep"))
    rig.run()
    rig.core.abort(["a"])
    rig.call(ResumeCall())
    passes = count_passes(rig, monkeypatch)
    assert rig.generate(PROMPT) == expected
    assert passes[0] == len(PROMPT) + 8


def test_policy_wake_tells_those_who_wait_when_it_fails(make_rig):
    rig = make_rig(on_sleeping_request="wake")
    expected = rig.generate(PROMPT)
    rig.call(SleepCall(1))
    rig.backend.fail_next("commit")
    rig.add("a", PROMPT)
    rig.run()
    assert isinstance(rig.ended["a"], WakeFailed)
    assert rig.generate(PROMPT) == expected, "the next request must try again"


def test_policy_wake_over_blank_weights_is_asleep_not_a_conflict(make_rig):
    rig = make_rig(on_sleeping_request="wake")
    reach(rig, "blank", "discarded")
    with pytest.raises(ModelSleeping):
        rig.generate(PROMPT)


def test_a_pause_holds_requests_for_resume(rig):
    expected = rig.generate(PROMPT)
    rig.call(PauseCall("keep"))
    rig.add("a", PROMPT)
    rig.run()
    assert "a" not in rig.ended
    rig.call(ResumeCall())
    rig.run()
    assert rig.tokens["a"] == expected


def test_calls_are_served_in_order(rig):
    """Would catch a wake overtaking the sleep that it was meant to end."""
    rig.add("a", PROMPT, LONG)
    rig.step()
    sleep, wake = rig.submit(SleepCall(1, mode="wait")), rig.submit(WakeCall())
    rig.run()
    assert (sleep[0].changed, wake[0].changed) == (True, True)
    assert rig.core.state.gate == "open"


def test_requests_that_never_fit_are_refused_in_every_state(rig):
    too_long = tuple(range(1, 256)) + tuple(range(1, 20))
    with pytest.raises(PromptTooLong):
        rig.generate(too_long)
    rig.call(PauseCall())
    with pytest.raises(PromptTooLong):
        rig.generate(too_long)


@pytest.mark.parametrize("call", [SleepCall(), WakeCall()])
def test_sleep_mode_must_be_asked_for(make_rig, call):
    rig = make_rig(enable_sleep_mode=False)
    with pytest.raises(SleepModeDisabled):
        rig.call(call)
    rig.call(ResetPrefixCacheCall())


@pytest.mark.parametrize(
    "call", [SleepCall(3), SleepCall(1, tags=()), SleepCall(1, tags=("x",)), SleepCall(1, mode="x")]
)
def test_bad_arguments_touch_nothing(rig, call):
    rig.add("a", PROMPT, LONG)
    rig.step()
    rig.backend.clear()
    with pytest.raises(InvalidRequest):
        rig.call(call)
    assert rig.backend.steps == []
    rig.run()
    assert rig.ended["a"] == "length"


def test_no_room_to_save_aborts_nothing(rig, monkeypatch):
    """Would catch requests aborted for a sleep that could have been known to fail."""
    rig.call(UpdateCall(named_tensors=negated_head(rig)))
    monkeypatch.setattr(DiskBacking, "free_bytes", lambda _self: 0)
    rig.add("a", PROMPT, LONG)
    rig.step()
    with pytest.raises(SleepFailed):
        rig.call(SleepCall(1))
    rig.run()
    assert rig.ended["a"] == "length"


def test_a_wake_that_outlasts_the_deadline_still_serves(make_rig, monkeypatch):
    """Would catch requests refused as asleep in the very step in which the model woke for them."""
    rig = make_rig(on_sleeping_request="wake", hold_timeout_s=0.05)
    expected = rig.generate(PROMPT)
    rig.call(SleepCall(1))
    wake = rig.core._sleep.wake

    def slow(tags, **options):
        time.sleep(0.1)
        return wake(tags, **options)

    monkeypatch.setattr(rig.core._sleep, "wake", slow)
    rig.add("a", PROMPT)
    rig.run()
    assert rig.tokens["a"] == expected


def test_policy_wake_does_not_rely_on_a_wake_of_only_one_tag(make_rig):
    rig = make_rig(on_sleeping_request="wake")
    expected = rig.generate(PROMPT)
    rig.call(SleepCall(1))
    rig.submit(WakeCall(("kv_cache",)))
    rig.add("a", PROMPT)
    rig.run()
    assert rig.tokens["a"] == expected


def test_what_a_wake_lets_in_is_drained_by_the_sleep_behind_it(make_rig):
    """Would catch held requests that a wake and a sleep in one go leave held, with nothing left to wake them."""
    rig = make_rig(on_sleeping_request="wake")
    expected = rig.generate(PROMPT)
    rig.call(SleepCall(1))
    rig.add("a", PROMPT)
    rig.submit(SleepCall(1, mode="wait"))
    rig.run()
    assert rig.tokens["a"] == expected
    assert rig.core.state.is_sleeping


def test_a_held_id_is_in_use(make_rig):
    """Would catch a request that is lost because another took its name while both were held."""
    rig = make_rig(on_sleeping_request="hold")
    rig.call(SleepCall(1))
    rig.add("a", PROMPT)
    with pytest.raises(InvalidRequest, match="in use"):
        rig.core._held.add(GenerateRequest("a", PROMPT), deadline=None)
    rig.call(WakeCall())
    rig.run()
    assert rig.ended["a"] == "length"


@pytest.mark.parametrize("timeout_s", ["5", float("nan"), -1.0, True])
@pytest.mark.parametrize("call", [SleepCall, PauseCall])
def test_a_deadline_is_a_number_of_seconds(rig, call, timeout_s):
    """Would catch a drain that never ends, or an engine that does."""
    with pytest.raises(InvalidRequest, match="timeout_s"):
        rig.call(call(mode="wait", timeout_s=timeout_s))
    assert rig.core.state.gate == "open"


# --- trust --------------------------------------------------------------------------------------


def test_a_corrupted_saved_extent_is_found_and_nothing_opens(rig):
    rig.call(UpdateCall(named_tensors=negated_head(rig)))
    rig.call(SleepCall(1))
    corrupt_saved(rig)
    with pytest.raises(VerificationFailed, match="checksum"):
        rig.call(WakeCall())
    assert residencies(rig) == {"weights": "offloaded", "kv_cache": "discarded"}
    with pytest.raises(ModelSleeping):
        rig.generate(PROMPT)
    rig.call(SleepCall(2))
    rig.call(WakeCall())
    assert rig.core.state.gate == "open"


def corrupt_saved(rig):
    """Flip bits in what the disk backing holds, behind the engine's back."""
    fd = rig.core._executor._worker.residency._backing._fd
    size = os.fstat(fd).st_size
    data = os.pread(fd, size, 0)
    os.pwrite(fd, bytes(byte ^ 0xFF for byte in data), 0)


def test_the_canary_notices_a_lost_buffer(rig):
    """Rotary frequencies live outside the arena, where no checksum looks."""
    rig.call(SleepCall(1))
    frequencies = rig.worker._model.decoder.inverse_frequencies
    frequencies.mul_(1.5)
    with pytest.raises(VerificationFailed, match="canary"):
        rig.call(WakeCall())
    assert rig.core.state.is_sleeping
    frequencies.div_(1.5)
    rig.call(WakeCall())
    assert rig.core.state.gate == "open"


def test_addresses_never_change(rig):
    pointers = [tensor.data_ptr() for tensor in rig.tensors().values()]
    for level in (1, 2):
        rig.call(SleepCall(level))
        rig.call(WakeCall())
    assert [tensor.data_ptr() for tensor in rig.tensors().values()] == pointers


def test_collective_rpc_reaches_the_worker(rig):
    assert rig.call(RpcCall("missing")) == [()]


@pytest.mark.parametrize("verify", ["off", "sample"])
def test_distrust_outlasts_a_failed_wake(make_rig, monkeypatch, verify):
    """Would catch a retry that looks elsewhere, or nowhere, and opens the gate over memory known to be wrong."""
    monkeypatch.setattr("shuteye.memory.weights.SAMPLE_BYTES", 1)
    rig = make_rig(verify_wake=verify, canary=False)
    rig.call(UpdateCall(named_tensors=list(tensors_of(rig).items())))
    rig.backend.fail_next("release", when="after")
    with pytest.raises(EngineFaulted):
        rig.call(SleepCall(1))
    corrupt_saved(rig)
    for _ in range(3):
        with pytest.raises(VerificationFailed):
            rig.call(WakeCall())
    rig.call(SleepCall(2))
    assert rig.call(WakeCall()).verified == "full"
    rig.call(SleepCall(1))
    assert rig.call(WakeCall()).verified == verify


def verified_modes(rig, monkeypatch):
    """How much each verification from now on compares."""
    modes, verify = [], rig.worker.residency.verify
    monkeypatch.setattr(rig.worker.residency, "verify", lambda mode: modes.append(mode) or verify(mode))
    return modes


def test_a_sample_that_was_wrong_is_followed_by_everything(make_rig, monkeypatch):
    """Would catch a retry whose sample lies elsewhere, and which opens the gate over the extent that was wrong."""
    rig = make_rig(verify_wake="sample")
    rig.call(SleepCall(1))
    wake_to_wrong_bytes(rig, monkeypatch)
    assert not rig.core.state.faulted
    assert rig.call(WakeCall()).verified == "full"


@pytest.mark.parametrize("verify", ["off", "sample"])
@pytest.mark.parametrize("way", ["wake", "reload"])
def test_only_a_full_verification_ends_distrust(make_rig, monkeypatch, verify, way):
    """Would catch weights that are trusted again because a sample of them, or nothing, was compared."""
    rig = make_rig(verify_wake=verify, canary=False)
    modes = verified_modes(rig, monkeypatch)
    rig.backend.fail_next("release", when="after")
    with pytest.raises(EngineFaulted):
        rig.call(SleepCall(1))
    rig.backend.available = 0
    with pytest.raises(WakeFailed):
        rig.call(WakeCall())  # it got as far as releasing: no fault any more, and yet nothing was compared
    rig.backend.available = None
    assert rig.core.state.faulted is None
    if way == "reload":
        rig.call(SleepCall(2))
        rig.call(WakeCall(("weights",)))
        rig.call(ReloadCall())
        rig.call(WakeCall())
    else:
        rig.call(WakeCall(("kv_cache",)))
        assert modes == []
        rig.call(WakeCall(("weights",)))
    assert modes == ["full"]
    rig.call(SleepCall(1))
    rig.call(WakeCall())
    assert modes == ["full"] + (["sample"] if verify == "sample" else [])


def test_an_update_that_breaks_off_is_checked_all_the_same(rig):
    """Would catch nonsense, written before the tensor that was refused, being served."""
    name, tensor = negated_head(rig)[0]
    bad = [(name, torch.full_like(tensor, float("nan"))), ("no_such.weight", tensor)]
    with pytest.raises(EngineFaulted, match="canary"):
        rig.call(UpdateCall(named_tensors=bad))
    with pytest.raises(EngineFaulted):
        rig.generate(PROMPT)


def test_an_update_that_writes_nothing_changes_no_version(rig):
    """Would catch a report of updated weights where none were, and a canary that forgot what it knew."""
    before = rig.call(RpcCall("weights_source"))
    with pytest.raises(InvalidRequest):
        rig.call(UpdateCall(named_tensors=[("no_such.weight", torch.zeros(1))]))
    rig.call(UpdateCall(named_tensors=[]))
    assert rig.call(RpcCall("weights_source")) == before


def test_versions_that_are_gone_leave_no_logits_behind(rig):
    """Would catch a worker that grows with every update."""
    for _ in range(3):
        rig.call(UpdateCall(named_tensors=negated_head(rig)))
        rig.call(SleepCall(2))
        rig.call(WakeCall())
    assert len(rig.core._executor._worker._canary._recorded) == 1


def damage(image_dir):
    """Flip one bit in the middle of an image's weights, as a failing disk would."""
    weights = next(image_dir.glob("weights*.bin"))
    weights.chmod(0o644)
    with weights.open("r+b") as file:
        file.seek(weights.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def test_a_damaged_image_is_refused_at_the_start(make_rig, tmp_path):
    """Would catch wrong tokens after a restart: the canary alone would record the damage as good."""
    image_dir = Path(make_rig(cache_dir=tmp_path).core.info.image_dir)
    damage(image_dir)
    with pytest.raises(ImageFailure, match=f"shuteye images rm {image_dir.name}"):
        make_rig(cache_dir=tmp_path)


def test_a_damaged_image_is_not_reloaded(make_rig, tmp_path):
    rig = make_rig(cache_dir=tmp_path)
    damage(Path(rig.core.info.image_dir))
    with pytest.raises(EngineFaulted, match="checksums"):
        rig.call(ReloadCall())
    with pytest.raises(EngineFaulted):
        rig.generate(PROMPT)


def test_a_fault_is_recovered_wholly_even_if_a_part_was_asked_for(rig):
    """Would catch blank weights mapped in the course of a recovery."""
    before = rig.generate(PROMPT)
    rig.backend.fail_next("release", when="after")
    with pytest.raises(EngineFaulted):
        rig.call(SleepCall(2))
    rig.call(WakeCall(("weights",)))
    assert rig.core.state.gate == "open"
    assert rig.generate(PROMPT) == before


@pytest.mark.parametrize("mode", ["abort", "keep", "wait"])
def test_a_sleep_that_cannot_save_costs_no_request(rig, mode):
    expected = rig.generate(PROMPT, LONG)
    rig.call(UpdateCall(named_tensors=list(tensors_of(rig).items())))
    rig.add("a", PROMPT, LONG)
    rig.step()
    rig.backend.fail_next("write_file")
    with pytest.raises(SleepFailed):
        rig.call(SleepCall(1, mode=mode))
    rig.run()
    assert rig.tokens["a"] == expected


@pytest.mark.parametrize("level", [1, 2])
def test_a_wake_from_a_deeper_level_ends_the_doze_too(rig, level):
    """Would catch a model that is awake, and yet dozes at the level it was at before."""
    before = rig.generate(PROMPT)
    rig.call(SleepCall(0))
    rig.call(SleepCall(level))
    rig.call(WakeCall())
    assert (rig.core.state.gate, rig.core.state.level) == ("open", None)
    assert rig.generate(PROMPT) == before


def test_a_sleep_without_room_is_refused_before_anybody_is_waited_for(rig, monkeypatch):
    """Would catch requests that are drained, or new ones refused, for a sleep that could never succeed."""
    expected = rig.generate(PROMPT, LONG)
    rig.call(UpdateCall(named_tensors=list(tensors_of(rig).items())))
    monkeypatch.setattr(rig.worker.residency._backing, "free_bytes", lambda: 0)
    rig.add("a", PROMPT, LONG)
    rig.step()
    with pytest.raises(SleepFailed, match="nothing was touched"):
        rig.call(SleepCall(1, mode="wait"))
    assert "a" not in rig.ended
    rig.run()
    assert rig.tokens["a"] == expected


def test_the_report_and_the_state_agree_on_the_level(rig):
    assert rig.call(SleepCall(2, tags=("kv_cache",))).level == rig.core.state.level == 1


def test_the_state_counts_kv_memory_as_requests_touch_it(make_rig):
    rig = make_rig(backend=LinuxBackend())  # the fake one touches everything to poison it
    rig.call(SleepCall(1, tags=("kv_cache",)))
    rig.call(WakeCall())
    touched = [next(tag.resident_bytes for tag in rig.core.state.tags if tag.tag == "kv_cache")]
    rig.generate(PROMPT)
    touched.append(next(tag.resident_bytes for tag in rig.core.state.tags if tag.tag == "kv_cache"))
    assert touched[0] < touched[1]


def test_a_surprise_while_adding_costs_that_request_alone(rig, monkeypatch):
    """A bug in how one request is taken in ending the engine for everybody, or half a request staying behind."""
    scheduler = rig.core._scheduler
    add = scheduler.add

    def surprising(request):
        add(request)
        if request.request_id == "strange":
            raise ZeroDivisionError("a bug")

    monkeypatch.setattr(scheduler, "add", surprising)
    rig.add("plain", PROMPT)
    rig.add("strange", PROMPT)
    rig.run()
    assert rig.ended["plain"] == "length"
    assert isinstance(rig.ended["strange"], InternalError)
    assert rig.core.stats.num_waiting == rig.core.stats.num_running == 0


def test_no_more_requests_wait_than_may(make_rig):
    """A queue that grows for as long as requests come faster than they are served."""
    rig = make_rig(max_num_seqs=1, max_waiting_requests=2)
    rig.add("runs", PROMPT)
    rig.step()
    for name in ("waits", "waits too", "refused"):
        rig.add(name, PROMPT)
    rig.run()
    assert isinstance(rig.ended.pop("refused"), QueueFull)
    assert set(rig.ended.values()) == {"length"}
