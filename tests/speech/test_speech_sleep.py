"""A model that transcribes sleeps and wakes as every other: the same transcript after, and nothing lost in between."""

import json
import shutil

import pytest
import torch
from speech_harness import noise

from shuteye.engine.messages import PauseCall, ReloadCall, ResumeCall, SleepCall, UpdateCall, WakeCall
from shuteye.errors import InvalidRequest, ModelSleeping
from shuteye.testing import poison

SAMPLES = noise(3.3)


def weights_of(rig):
    return [rig.worker._weights.slot_view(slot) for slot in rig.worker._image.layout.slots.values()]


@pytest.mark.parametrize("level", [1, 2])
def test_the_same_transcript_after_every_cycle(rig, level):
    """A parameter that is no view of the arena, or a buffer that was lost: fresh memory is poisoned."""
    before = rig.transcribe(SAMPLES)
    for _ in range(3):
        report = rig.call(SleepCall(level))
        assert report.freed_bytes >= 0.98 * rig.core.info.weights_bytes
        assert rig.call(WakeCall()).canary
        assert rig.transcribe(SAMPLES).stretches == before.stretches


def test_every_weight_is_in_the_arena(rig):
    """A parameter with memory of its own: it would stay resident, and keep its values."""
    before = rig.transcribe(SAMPLES).stretches
    for weight in weights_of(rig):
        poison(weight)
    module = rig.worker._model._module
    assert all((parameter == parameter.flatten()[0]).all() for parameter in module.parameters())
    rig.call(ReloadCall())
    assert rig.transcribe(SAMPLES).stretches == before


def test_written_weights_survive_level_1_and_not_level_2(rig):
    """Updates that a sleep loses, or that level 2 does not forget."""
    before = rig.transcribe(SAMPLES).stretches
    name = "model.decoder.layer_norm.weight"
    state = {"proj_out.weight", "model.decoder.embed_tokens.weight", name}
    assert all(rig.worker._model.slot_of(each) for each in state), "names of the checkpoint, tied ones included"
    tensor = rig.worker._weights.slot_view(rig.worker._image.layout.slots[name]) * -1
    rig.call(UpdateCall(named_tensors=[(name, tensor)]))
    changed = rig.transcribe(SAMPLES).stretches
    assert changed != before
    rig.call(SleepCall(1))
    rig.call(WakeCall())
    assert rig.transcribe(SAMPLES).stretches == changed
    rig.call(SleepCall(2))
    rig.call(WakeCall())
    assert rig.transcribe(SAMPLES).stretches == before


def test_the_canary_notices_a_changed_weight(rig):
    """A canary that does not run every layer."""
    assert rig.worker.canary_agrees()
    for name, slot in rig.worker._image.layout.slots.items():
        if "embed_positions" in name:
            continue  # a short pass reads its first rows alone; checksums cover the others
        view = rig.worker._weights.slot_view(slot)
        kept = view.clone()
        view += torch.randn(view.shape, generator=torch.Generator().manual_seed(0))
        noticed = not rig.worker.canary_agrees()
        view.copy_(kept)
        assert noticed, name
    assert rig.worker.canary_agrees()


@pytest.mark.parametrize("steps", [1, 2, 5, 12, 30, 60])
@pytest.mark.parametrize("level", [1, 2])
def test_keep_goes_on_where_it_was(make_rig, level, steps):
    """A window begun anew from nothing, text that is sent twice, or a recording that the worker no longer has."""
    rig = make_rig(1)
    expected = rig.transcribe(SAMPLES).stretches
    rig.add("kept", SAMPLES)
    rig.add("short", noise(0.9))
    for _ in range(steps):
        rig.step()
    report = rig.call(SleepCall(level, mode="keep"))
    assert report.held_requests == sum(each.ended is None for each in rig.received.values())
    assert rig.kept == set(), "caches that stay while asleep"
    rig.call(WakeCall())
    rig.run()
    assert rig.received["kept"].stretches == expected
    assert rig.received["kept"].token_ids == [token for _, _, text in expected for token in text]
    assert rig.received["short"].token_ids == rig.transcribe(noise(0.9)).token_ids


@pytest.mark.parametrize("steps", [3, 40])
def test_keep_draws_the_same_tokens_at_a_temperature(rig, steps):
    """Draws that begin anew after a sleep."""
    expected = rig.transcribe(SAMPLES, temperature=0.8, seed=3).stretches
    rig.add("kept", SAMPLES, temperature=0.8, seed=3)
    for _ in range(steps):
        rig.step()
    rig.call(SleepCall(1, mode="keep"))
    rig.call(WakeCall())
    rig.run()
    assert rig.received["kept"].stretches == expected


def test_keep_while_the_language_is_being_found_out(make_rig):
    """A language that is asked for twice, or never."""
    rig = make_rig(2, multilingual=True)
    expected = rig.transcribe(SAMPLES)
    rig.add("kept", SAMPLES)
    rig.step()
    assert rig.received["kept"].language == expected.language
    rig.call(SleepCall(1, mode="keep"))
    rig.call(WakeCall())
    rig.run()
    assert rig.received["kept"].stretches == expected.stretches


def test_wait_lets_a_transcription_finish_and_abort_ends_it(rig):
    """A drain that cuts a transcript off, or an abort that leaves caches behind."""
    expected = rig.transcribe(SAMPLES).stretches
    rig.add("waited-for", SAMPLES)
    rig.step()
    rig.call(SleepCall(1, mode="wait"))
    assert rig.received["waited-for"].stretches == expected
    rig.call(WakeCall())
    rig.add("aborted", SAMPLES)
    rig.step()
    assert rig.call(SleepCall(1, mode="abort")).aborted_requests == 1
    assert rig.received["aborted"].ended == "abort"
    assert rig.kept == set()


def test_a_pause_holds_and_goes_on(rig):
    """Tokens that are sampled while paused, or a recording that is lost over it."""
    expected = rig.transcribe(SAMPLES).stretches
    rig.add("held", SAMPLES)
    for _ in range(7):
        rig.step()
    rig.call(PauseCall(mode="keep"))
    rig.run()
    assert rig.received["held"].ended is None
    rig.call(ResumeCall())
    rig.run()
    assert rig.received["held"].stretches == expected


def test_an_aborted_request_frees_what_is_kept_of_it(rig):
    """Caches of requests that nobody waits for."""
    rig.add("a", SAMPLES)
    rig.add("b", SAMPLES)
    for _ in range(3):
        rig.step()
    assert rig.kept == {"a", "b"}
    rig.core.abort(["a"])
    rig.run()
    assert (rig.received["a"].ended, rig.received["b"].ended) == ("abort", True)
    assert rig.kept == set()


@pytest.mark.parametrize("policy", ["reject", "hold", "wake"])
def test_requests_that_arrive_while_asleep(make_rig, policy):
    """A policy that holds for generation alone."""
    rig = make_rig(on_sleeping_request=policy)
    expected = rig.transcribe(SAMPLES).stretches
    rig.call(SleepCall(1))
    rig.add("late", SAMPLES)
    rig.run()
    if policy == "reject":
        assert isinstance(rig.received["late"].ended, ModelSleeping)
        return
    if policy == "hold":
        assert rig.received["late"].ended is None
        rig.call(WakeCall())
        rig.run()
    assert rig.received["late"].stretches == expected


def test_a_reload_takes_other_weights_and_refuses_another_model(rig, checkpoints, tmp_path):
    """New weights led through a recording by the old model's rules, or a refusal of what reloading is for."""
    other = shutil.copytree(checkpoints(1), tmp_path / "other")
    before = rig.transcribe(SAMPLES).stretches
    rig.call(ReloadCall(str(other)))
    assert rig.transcribe(SAMPLES).stretches != before
    rules = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps(rules | {"suppress_tokens": [1, 2]}))
    with pytest.raises(InvalidRequest, match=r"generation_config.json: suppress_tokens \[1, 2, 257"):
        rig.call(ReloadCall(str(other)))
