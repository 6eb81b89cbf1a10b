"""Transcriptions equal those of transformers' own `generate`, token by token and second by second."""

import pytest
import torch
from speech_harness import Reference, noise

from shuteye.errors import InvalidRequest
from shuteye.tasks.transcribe.plans import SpeechAdmission
from shuteye.tasks.transcribe.requests import TranscribeParams
from shuteye.tasks.transcribe.runner import _AudioState

SEEDS = range(4)


@pytest.mark.parametrize("seed", SEEDS)
def test_short_recordings(make_harness, reference, seed):
    """Other features, other suppressed tokens, a cache that mixes requests up, or an end in the wrong place."""
    harness, right = make_harness(seed), reference(seed)
    for length in (0.1, 0.4, 0.999, 1.0):
        samples = noise(length, seed=seed)
        assert harness.transcribe(samples).token_ids == right.short(samples)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_long_recordings(make_harness, reference, seed):
    """A wrong seek, a segment cut elsewhere, timestamp rules that differ, or a wrong last window."""
    harness, right = make_harness(seed), reference(seed)
    for length in (1.001, 4.3):
        samples = noise(length, seed=seed)
        received, expected = harness.transcribe(samples), right.long(samples)
        assert received.stretches == expected
        assert received.token_ids == [token for _, _, text in expected for token in text]


@pytest.mark.parametrize("seed", SEEDS)
def test_short_recordings_with_timestamps(make_harness, reference, seed):
    """Timestamps asked for, yet the recording received without them."""
    samples = noise(0.9, seed=seed)
    assert make_harness(seed).transcribe(samples, timestamps=True).stretches == reference(seed).long(samples)


def test_a_prompt_is_taken_for_the_text_before(harness, reference):
    """A prompt that is dropped, or given to the first window alone."""
    prompt, right = [70, 71, 72], reference()
    start_of_previous = right.model.generation_config.prev_sot_token_id
    prompt_ids = torch.tensor([start_of_previous, *prompt])
    samples = noise(2.5)
    received = harness.transcribe(samples, prompt=prompt)
    assert received.stretches == right.long(samples, prompt_ids=prompt_ids)
    assert received.stretches != harness.transcribe(samples).stretches
    many = [*range(60, 100)]
    assert (
        harness.transcribe(noise(0.5), prompt=many).token_ids
        == harness.transcribe(noise(0.5), prompt=many[-15:]).token_ids
    )


@pytest.mark.slow
def test_many_at_once_are_each_as_if_alone(make_harness, reference):
    """Rows of a batch that see each other's keys or positions."""
    harness, right = make_harness(1), reference(1)
    recordings = {f"r{index}": noise(0.5 + 0.9 * index, seed=index) for index in range(5)}
    for request_id, samples in recordings.items():
        harness.add(request_id, samples, timestamps=True)
    harness.run()
    for request_id, samples in recordings.items():
        assert harness.received[request_id].stretches == right.long(samples), request_id


def test_the_language_is_found_out_or_given(make_harness, reference):
    """A prompt without language or task, a language found by other logits, or one that is forgotten after a window."""
    harness, right = make_harness(2, multilingual=True), reference(2, multilingual=True)
    samples = noise(2.2)
    found = harness.transcribe(samples)
    assert found.stretches == right.long(samples, task="transcribe")
    names = {"en": "english", "de": "german", "fr": "french"}
    for code, name in names.items():
        given = harness.transcribe(samples, language=code)
        assert given.stretches == right.long(samples, language=code, task="transcribe")
        assert given.language == code
        assert harness.transcribe(samples, language=name.upper()).stretches == given.stretches
    assert found.language in names


def test_translations_are_transformers_own(make_harness, reference):
    """The other task's token, or none, before the text."""
    harness, right = make_harness(2, multilingual=True), reference(2, multilingual=True)
    samples = noise(2.2)
    translated = harness.transcribe(samples, language="de", task="translate")
    assert translated.stretches == right.long(samples, language="de", task="translate")
    assert translated.stretches != harness.transcribe(samples, language="de").stretches
    assert harness.transcribe(samples, task="translate").stretches == right.long(samples, task="translate")


def test_no_more_tokens_than_asked_for(harness):
    """A limit for each window in place of one for all, a token too many, or text without its last tokens."""
    for samples, timestamps in ((noise(0.9), False), (noise(3.2), True)):
        whole = harness.transcribe(samples, timestamps=timestamps)
        assert len(whole.token_ids) > 6
        for limit in (1, 5):
            cut = harness.transcribe(samples, timestamps=timestamps, max_tokens=limit)
            assert len(cut.token_ids) <= limit
            assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
            assert timestamps or len(cut.token_ids) == limit
        beyond = harness.transcribe(samples, timestamps=timestamps, max_tokens=10**6)
        assert beyond.stretches == whole.stretches


def test_what_cannot_be_transcribed_is_refused(harness, make_harness):
    """A request that hangs, or that fails as if it were our bug."""
    with pytest.raises(InvalidRequest, match="at least 1600"):
        harness.transcribe(noise(0.09))
    with pytest.raises(InvalidRequest, match="English-only") as refused:
        harness.transcribe(noise(1), language="de")
    assert refused.value.param == "language"
    with pytest.raises(InvalidRequest, match="English-only"):
        harness.transcribe(noise(1), task="translate")
    with pytest.raises(InvalidRequest, match="special tokens"):
        harness.transcribe(noise(1), prompt=[300])
    with pytest.raises(InvalidRequest, match="knows de, en, fr"):
        make_harness(2, multilingual=True).transcribe(noise(1), language="xx")


def test_a_seed_draws_the_same_again_and_another_seed_something_else(harness):
    """A temperature that is ignored, or draws that depend on who else is served."""
    samples = noise(0.9)
    first = harness.transcribe(samples, temperature=1.0, seed=1).token_ids
    harness.add("again", samples, temperature=1.0, seed=1)
    harness.add("beside", noise(3.0))
    harness.run()
    assert harness.received["again"].token_ids == first
    assert harness.transcribe(samples, temperature=1.0, seed=2).token_ids != first
    assert harness.transcribe(samples).token_ids != first


def test_every_draw_is_another(harness):
    """One number for all tokens of a request: text that repeats itself."""
    runner = harness.worker._runner
    state = _AudioState(SpeechAdmission("r", b"", TranscribeParams(temperature=1.0, seed=3), pad=True), torch.empty(0))
    flat = torch.zeros(harness.core.info.vocab_size)
    drawn = [runner._choose(state, flat, num_sampled=index).token_id for index in range(50)]
    assert len(set(drawn)) > 30
    assert max(drawn) < 256, "special tokens are suppressed"


@pytest.mark.slow
@pytest.mark.model
def test_the_real_model_on_speech(whisper, spoken, tmp_path):
    """A conversion, a feature or a rule that is wrong where it matters: on words, and beyond thirty seconds."""
    import numpy as np

    from shuteye import LLM
    from shuteye.config import default_cache_dir

    right = Reference(whisper.path)
    long = np.concatenate([spoken, spoken, spoken])
    with LLM(str(whisper.path), cache_dir=default_cache_dir(), num_threads=1) as llm:
        short_text, long_text = llm.transcribe([spoken, long])
        tokenizer = llm.get_tokenizer()
    assert short_text.text == tokenizer.decode(right.short(spoken)).strip()
    words = "is Alice and I live in London with my two cats. We went to the market and bought apples, bread and cheese."
    assert words in short_text.text
    assert "Please call me tomorrow morning at 7 o'clock." in short_text.text
    assert long_text.duration > 30
    expected = right.long(long)
    assert [each.start for each in long_text.segments] == pytest.approx([start for start, _, _ in expected])
    assert [each.end for each in long_text.segments] == pytest.approx([end for _, end, _ in expected])
    assert [list(each.token_ids) for each in long_text.segments] == [each[2] for each in expected]
