"""`reload_weights(path)`: other weights of the same model are taken, another model is refused with nothing touched."""

import json
import shutil

import pytest

from shuteye.calls import ReloadCall, SleepCall, WakeCall
from shuteye.errors import InvalidRequest
from shuteye.testing import tiny_encoder, tiny_model

PROMPT = tuple(range(5, 45))


def edit(path, **changes):
    """Set keys of a JSON file, made if need be."""
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


CHANGES = {
    # what differs: (file, keys to set, what the refusal names)
    "rope": ("config.json", {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}, "rope_theta 10000"),
    "eps": ("config.json", {"rms_norm_eps": 1e-3}, r"rms_norm_eps 1e-06 → 0\.001"),
    "eos": ("generation_config.json", {"eos_token_id": [2, 9]}, r"eos_token_ids \[2\] → \[2, 9\]"),
    "sampling": ("generation_config.json", {"temperature": 0.3}, r"default_sampling.temperature absent → 0\.3"),
    "context": ("config.json", {"max_position_embeddings": 64}, "max_position_embeddings 512 → 64"),
    "special token": ("tokenizer_config.json", {"eos_token": "<|im_start|>"}, r"eos_token <\|im_end\|> → <\|im_start"),
    "chat template": ("tokenizer_config.json", {"chat_template": "{{ messages }}"}, "chat_template.jinja of the token"),
}


@pytest.fixture
def other(tiny_checkpoint, tmp_path):
    """A copy of the checkpoint, to be changed."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "other")


def state_of(harness):
    return harness.core.state, harness.core._executor.call("weights_source"), harness.worker._image.path


@pytest.mark.parametrize("name", CHANGES)
def test_another_model_of_the_same_layout_is_refused_by_name(harness, other, name):
    """Would catch new weights that run with the old model's rotation, norms, ends or sampling, and are called good."""
    file, keys, named = CHANGES[name]
    edit(other / file, **keys)
    expected, before = harness.generate(PROMPT), state_of(harness)
    with pytest.raises(InvalidRequest, match=named) as caught:
        harness.call(ReloadCall(str(other)))
    assert caught.value.param == "path"
    assert state_of(harness) == before
    assert harness.generate(PROMPT) == expected


def test_another_tokenizer_is_refused(harness, other):
    """Would catch prompts whose tokens mean something else to the new weights."""
    path = other / "tokenizer.json"
    path.write_text(path.read_text().replace("filler_0", "other_0"))
    with pytest.raises(InvalidRequest, match=r"tokenizer\.json of the tokenizer"):
        harness.call(ReloadCall(str(other)))


def test_other_weights_of_the_same_model_are_taken(harness, make_harness, tmp_path):
    """Would catch a refusal of what reloading is for, such as for who wrote the files, and with what dtype in mind."""
    other = tiny_model(tmp_path / "other", seed=1)
    edit(other / "config.json", use_cache=False, dtype="bfloat16", transformers_version="4.50.0")
    edit(other / "generation_config.json", transformers_version="4.50.0")
    before = harness.generate(PROMPT)
    harness.call(ReloadCall(str(other)))
    after = harness.generate(PROMPT)
    assert after != before
    assert after == make_harness(model=str(other)).generate(PROMPT)
    harness.call(SleepCall(2))
    harness.call(WakeCall())
    assert harness.generate(PROMPT) == after


def test_another_model_is_refused_after_level_2_too(harness, other, tmp_path):
    """Would catch blank weights that are filled by another model, or a refusal from which no way leads back."""
    before = harness.generate(PROMPT)
    edit(other / "config.json", rms_norm_eps=1e-3)
    harness.call(SleepCall(2))
    harness.call(WakeCall(("weights",)))
    with pytest.raises(InvalidRequest, match="rms_norm_eps"):
        harness.call(ReloadCall(str(other)))
    assert [tag.residency for tag in harness.core.state.tags] == ["blank", "discarded"]
    harness.call(ReloadCall())
    harness.call(WakeCall())
    assert harness.generate(PROMPT) == before


def test_a_reload_of_an_encoder_that_pools_otherwise_is_refused(make_harness, tmp_path):
    """Would catch embeddings that are pooled as the old model's were."""
    paths = [tiny_encoder(tmp_path / name, pooling=name, seed=0) for name in ("mean", "cls")]
    paths.append(tiny_encoder(tmp_path / "trained", pooling="mean", seed=1))
    harness = make_harness(model=str(paths[0]), max_model_len=128, kv_cache_memory=None)
    with pytest.raises(InvalidRequest, match="pooling mean → cls"):
        harness.call(ReloadCall(str(paths[1])))
    assert harness.call(ReloadCall(str(paths[2]))).updated > 0
