"""The engine's configuration: what it takes, and in what form it keeps it."""

from __future__ import annotations

from pathlib import Path

import pytest

from shuteye import LLM, EngineConfig
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
