"""A model that transcribes sleeps and wakes as every other: the same transcript after, and nothing lost in between."""

import json
import shutil

import pytest
import torch
from speech_harness import noise

from shuteye.calls import PauseCall, ReloadCall, ResumeCall, SleepCall, UpdateCall, WakeCall
from shuteye.errors import InvalidRequest, ModelSleeping
from shuteye.models.tensors import slot_view
from shuteye.testing import poison

SAMPLES = noise(3.3)


def weights_of(harness):
    return [slot_view(harness.worker._weights, slot) for slot in harness.worker._image.layout.slots.values()]


@pytest.mark.parametrize("level", [1, 2])
def test_the_same_transcript_after_every_cycle(harness, level):
    """A parameter that is no view of the arena, or a buffer that was lost: fresh memory is poisoned."""
    before = harness.transcribe(SAMPLES)
    for _ in range(3):
        report = harness.call(SleepCall(level))
        assert report.freed_bytes >= 0.98 * harness.core.info.weights_bytes
        assert harness.call(WakeCall()).canary
        assert harness.transcribe(SAMPLES).stretches == before.stretches


def test_every_weight_is_in_the_arena(harness):
    """A parameter with memory of its own: it would stay resident, and keep its values."""
    before = harness.transcribe(SAMPLES).stretches
    for weight in weights_of(harness):
        poison(weight)
    module = harness.worker._model._module
    assert all((parameter == parameter.flatten()[0]).all() for parameter in module.parameters())
    harness.call(ReloadCall())
    assert harness.transcribe(SAMPLES).stretches == before


def test_written_weights_survive_level_1_and_not_level_2(harness):
    """Updates that a sleep loses, or that level 2 does not forget."""
    before = harness.transcribe(SAMPLES).stretches
    name = "model.decoder.layer_norm.weight"
    state = {"proj_out.weight", "model.decoder.embed_tokens.weight", name}
    assert state <= harness.worker._model.slot_names.keys(), "names of the checkpoint, tied ones included"
    tensor = slot_view(harness.worker._weights, harness.worker._image.layout.slots[name]) * -1
    harness.call(UpdateCall(named_tensors=[(name, tensor)]))
    changed = harness.transcribe(SAMPLES).stretches
    assert changed != before
    harness.call(SleepCall(1))
    harness.call(WakeCall())
    assert harness.transcribe(SAMPLES).stretches == changed
    harness.call(SleepCall(2))
    harness.call(WakeCall())
    assert harness.transcribe(SAMPLES).stretches == before


def test_the_canary_notices_a_changed_weight(harness):
    """A canary that does not run every layer."""
    assert harness.worker.canary_agrees()
    for name, slot in harness.worker._image.layout.slots.items():
        if "embed_positions" in name:
            continue  # a short pass reads its first rows alone; checksums cover the others
        view = slot_view(harness.worker._weights, slot)
        kept = view.clone()
        view += torch.randn(view.shape, generator=torch.Generator().manual_seed(0))
        noticed = not harness.worker.canary_agrees()
        view.copy_(kept)
        assert noticed, name
    assert harness.worker.canary_agrees()


@pytest.mark.parametrize("steps", [1, 5, 30, *(pytest.param(steps, marks=pytest.mark.slow) for steps in (2, 12, 60))])
@pytest.mark.parametrize("level", [1, 2])
def test_keep_goes_on_where_it_was(make_harness, level, steps):
    """A window begun anew from nothing, text that is sent twice, or a recording that the worker no longer has."""
    harness = make_harness(1)
    expected = harness.transcribe(SAMPLES).stretches
    harness.add("kept", SAMPLES)
    harness.add("short", noise(0.9))
    for _ in range(steps):
        harness.step()
    report = harness.call(SleepCall(level, mode="keep"))
    assert report.held_requests == sum(each.ended is None for each in harness.received.values())
    assert harness.kept == set(), "caches that stay while asleep"
    harness.call(WakeCall())
    harness.run()
    assert harness.received["kept"].stretches == expected
    assert harness.received["kept"].token_ids == [token for _, _, text in expected for token in text]
    assert harness.received["short"].token_ids == harness.transcribe(noise(0.9)).token_ids


@pytest.mark.parametrize("steps", [3, 40])
def test_keep_draws_the_same_tokens_at_a_temperature(harness, steps):
    """Draws that begin anew after a sleep."""
    expected = harness.transcribe(SAMPLES, temperature=0.8, seed=3).stretches
    harness.add("kept", SAMPLES, temperature=0.8, seed=3)
    for _ in range(steps):
        harness.step()
    harness.call(SleepCall(1, mode="keep"))
    harness.call(WakeCall())
    harness.run()
    assert harness.received["kept"].stretches == expected


def test_keep_while_the_language_is_being_found_out(make_harness):
    """A language that is asked for twice, or never."""
    harness = make_harness(2, multilingual=True)
    expected = harness.transcribe(SAMPLES)
    harness.add("kept", SAMPLES)
    harness.step()
    assert harness.received["kept"].language == expected.language
    harness.call(SleepCall(1, mode="keep"))
    harness.call(WakeCall())
    harness.run()
    assert harness.received["kept"].stretches == expected.stretches


def test_wait_lets_a_transcription_finish_and_abort_ends_it(harness):
    """A drain that cuts a transcript off, or an abort that leaves caches behind."""
    expected = harness.transcribe(SAMPLES).stretches
    harness.add("waited-for", SAMPLES)
    harness.step()
    harness.call(SleepCall(1, mode="wait"))
    assert harness.received["waited-for"].stretches == expected
    harness.call(WakeCall())
    harness.add("aborted", SAMPLES)
    harness.step()
    assert harness.call(SleepCall(1, mode="abort")).aborted_requests == 1
    assert harness.received["aborted"].ended == "abort"
    assert harness.kept == set()


def test_a_pause_holds_and_goes_on(harness):
    """Tokens that are sampled while paused, or a recording that is lost over it."""
    expected = harness.transcribe(SAMPLES).stretches
    harness.add("held", SAMPLES)
    for _ in range(7):
        harness.step()
    harness.call(PauseCall(mode="keep"))
    harness.run()
    assert harness.received["held"].ended is None
    harness.call(ResumeCall())
    harness.run()
    assert harness.received["held"].stretches == expected


def test_an_aborted_request_frees_what_is_kept_of_it(harness):
    """Caches of requests that nobody waits for."""
    harness.add("a", SAMPLES)
    harness.add("b", SAMPLES)
    for _ in range(3):
        harness.step()
    assert harness.kept == {"a", "b"}
    harness.core.abort(["a"])
    harness.run()
    assert (harness.received["a"].ended, harness.received["b"].ended) == ("abort", True)
    assert harness.kept == set()


@pytest.mark.parametrize("policy", ["reject", "hold", "wake"])
def test_requests_that_arrive_while_asleep(make_harness, policy):
    """A policy that holds for generation alone."""
    harness = make_harness(on_sleeping_request=policy)
    expected = harness.transcribe(SAMPLES).stretches
    harness.call(SleepCall(1))
    harness.add("late", SAMPLES)
    harness.run()
    if policy == "reject":
        assert isinstance(harness.received["late"].ended, ModelSleeping)
        return
    if policy == "hold":
        assert harness.received["late"].ended is None
        harness.call(WakeCall())
        harness.run()
    assert harness.received["late"].stretches == expected


def test_a_reload_takes_other_weights_and_refuses_another_model(harness, whisper_checkpoints, tmp_path):
    """New weights led through a recording by the old model's rules, or a refusal of what reloading is for."""
    other = shutil.copytree(whisper_checkpoints(1), tmp_path / "other")
    before = harness.transcribe(SAMPLES).stretches
    harness.call(ReloadCall(str(other)))
    assert harness.transcribe(SAMPLES).stretches != before
    rules = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps(rules | {"suppress_tokens": [1, 2]}))
    with pytest.raises(InvalidRequest, match=r"generation_config.json: suppress_tokens \[1, 2, 257"):
        harness.call(ReloadCall(str(other)))
