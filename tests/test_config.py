"""The engine's configuration: what it takes, and in what form it keeps it."""

from __future__ import annotations

from pathlib import Path

import pytest

from shuteye import LLM, EngineConfig, SamplingParams
from shuteye.errors import InvalidRequest
from shuteye.typed_frames import Decoder, encode


@pytest.mark.parametrize("given", [str, Path])
def test_a_path_may_be_text_and_is_kept_as_a_path(tmp_path, given):
    """Would catch a text that fails far from where it was given, as in `cache_dir / "spill"`."""
    config = EngineConfig(given(tmp_path / "model"), cache_dir=given(tmp_path))
    assert (config.model, config.cache_dir) == (str(tmp_path / "model"), tmp_path)
    assert Decoder[EngineConfig](EngineConfig).decode(encode(config)) == config


def test_the_tilde_is_the_users_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert EngineConfig(cache_dir="~/shuteye").cache_dir == Path("/home/someone/shuteye")


@pytest.mark.parametrize(("name", "value"), [("cache_dir", 3), ("cache_dir", ""), ("cache_dir", None), ("model", 3)])
def test_what_is_no_path_is_refused_by_name(name, value):
    with pytest.raises(InvalidRequest, match=rf"{name} must .*{value!r}") as caught:
        EngineConfig(**{name: value})
    assert caught.value.param == name


def test_an_llm_takes_its_cache_directory_as_text(tiny_checkpoint, tiny_options):
    options = tiny_options | {"cache_dir": str(tiny_options["cache_dir"])}
    with LLM(tiny_checkpoint, **options) as llm:
        assert llm.generate([[5, 6, 7]])[0].outputs[0].token_ids


@pytest.mark.parametrize(
    ("given", "kept"), [("bf16", "bfloat16"), ("fp16", "float16"), ("half", "float16"), ("int8_per_token_head", "int8")]
)
def test_a_kv_cache_dtype_has_several_names(given, kept):
    """vLLM's and ours: one that is taken and means nothing, or something else, to the engine."""
    assert EngineConfig(kv_cache_dtype=given).kv_cache_dtype == kept
    assert EngineConfig(kv_cache_dtype=kept).kv_cache_dtype == kept


@pytest.mark.parametrize("given", ["fp8", "fp8_e5m2", "int4", ""])
def test_other_kv_cache_dtypes_are_refused_by_name(given):
    with pytest.raises(InvalidRequest, match=f"got '{given}'") as refused:
        EngineConfig(kv_cache_dtype=given)
    assert refused.value.param == "kv_cache_dtype"
    assert ("int8 takes as many bytes" in refused.value.message) == given.startswith("fp8")


def test_an_llm_holds_its_kv_cache_as_it_is_told(tiny_checkpoint, tiny_options):
    """More blocks of the same memory, also after a wake, whose canary ran over the same cache."""
    seen, prompts, greedy = {}, [list(range(5, 60))], SamplingParams(temperature=0, max_tokens=4)
    for held in ("auto", "int8"):
        with LLM(tiny_checkpoint, **tiny_options, kv_cache_dtype=held, enable_sleep_mode=True) as llm:
            before = llm.generate(prompts, greedy)[0].outputs[0].token_ids
            llm.sleep(level=1)
            llm.wake_up()
            assert llm.generate(prompts, greedy)[0].outputs[0].token_ids == before
            seen[held] = llm.info
    plain, quantized = seen["auto"], seen["int8"]
    assert (plain.kv_cache_dtype, quantized.kv_cache_dtype) == (plain.dtype, "int8")
    assert quantized.num_blocks * quantized.kv_bytes_per_token <= plain.num_blocks * plain.kv_bytes_per_token
    assert quantized.num_blocks > 1.5 * plain.num_blocks
