"""Values that a user constructs: what is of another type than its field is refused where it is given."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from shuteye import EngineConfig, SamplingParams
from shuteye.errors import InvalidRequest
from shuteye.server.config import ServerConfig
from shuteye.tasks.generate.requests import StructuredOutputsParams
from shuteye.tasks.pool.requests import PoolingParams
from shuteye.tasks.transcribe.requests import TranscribeParams
from shuteye.typed_frames import Decoder, encode

WRONG = [
    (EngineConfig, "dtype", "half", "'auto', 'bfloat16', 'float16', 'float32'"),
    (EngineConfig, "dtype", ["float32"], "'auto'"),
    (EngineConfig, "max_num_seqs", 1.5, "an integer"),
    (EngineConfig, "max_num_seqs", 64.0, "an integer"),
    (EngineConfig, "max_num_seqs", True, "an integer"),
    (EngineConfig, "max_num_seqs", None, "an integer"),
    (EngineConfig, "kv_cache_memory", "1MiB", "an integer or None"),
    (EngineConfig, "enable_sleep_mode", "no", "True or False"),
    (EngineConfig, "enable_sleep_mode", 1, "True or False"),
    (EngineConfig, "seed", "x", "an integer"),
    (EngineConfig, "seed", math.nan, "an integer"),
    (EngineConfig, "hold_timeout_s", "60", "a finite number"),
    (EngineConfig, "hold_timeout_s", math.inf, "a finite number"),
    pytest.param(EngineConfig, "hold_timeout_s", 10**400, "a finite number", id="huge"),
    (EngineConfig, "revision", 7, "a text or None"),
    (SamplingParams, "max_tokens", 1.5, "an integer or None"),
    (SamplingParams, "top_k", 1.5, "an integer"),
    (SamplingParams, "n", True, "an integer"),
    (SamplingParams, "seed", "x", "an integer or None"),
    (SamplingParams, "temperature", math.nan, "a finite number"),
    (SamplingParams, "temperature", "0", "a finite number"),
    (SamplingParams, "temperature", False, "a finite number"),
    (SamplingParams, "stop", 5, "a text or a list of texts"),
    (SamplingParams, "stop", b"x", "a text or a list of texts"),
    (SamplingParams, "stop", ["a", 5], "a text or a list of texts"),
    (SamplingParams, "stop_token_ids", "12", "a list of integers"),
    (SamplingParams, "stop_token_ids", [1, 2.5], "a list of integers"),
    (SamplingParams, "allowed_token_ids", 3, "a list of integers or None"),
    (SamplingParams, "bad_words", "bad", "a list of texts"),
    (SamplingParams, "logit_bias", {"5": 1.0}, "a dict of integers to finite numbers or None"),
    (SamplingParams, "logit_bias", [5], "a dict"),
    (SamplingParams, "structured_outputs", {"json": "{}"}, "StructuredOutputsParams or None"),
    (SamplingParams, "ignore_eos", "yes", "True or False"),
    (PoolingParams, "dimensions", 1.5, "an integer or None"),
    (PoolingParams, "use_activation", "no", "True or False or None"),
    (TranscribeParams, "language", 5, "a text or None"),
    (TranscribeParams, "timestamps", 1, "True or False"),
    (ServerConfig, "port", "8000", "an integer"),
    (ServerConfig, "host", None, "a text"),
    (ServerConfig, "served_model_name", "name", "a list of texts"),
    (ServerConfig, "tool_call_parser", "gpt", "'auto' or one of 'hermes'"),
]


@pytest.mark.parametrize(("kind", "name", "value", "expected"), WRONG)
def test_a_value_of_another_type_is_refused_where_it_is_given(kind, name, value, expected):
    """Catches a TypeError far away, an engine that loads for a minute and then fails, and "no" taken for yes."""
    with pytest.raises(InvalidRequest, match=rf"^{name} must be ") as caught:
        kind(**{name: value})
    assert caught.value.param == name
    assert expected in caught.value.message
    assert f", got {repr(value)[:4]}" in caught.value.message


def test_a_wrong_structure_names_the_callers_field():
    """Catches an error about a field that the caller of a route never wrote."""
    with pytest.raises(InvalidRequest, match=r"regex of guided_regex must be a text or None, got 5") as caught:
        StructuredOutputsParams(regex=5, param="guided_regex")
    assert caught.value.param == "guided_regex"


def test_numbers_of_numpy_are_kept_as_pythons():
    """Catches a number that samples well in this process and cannot be sent to an engine in another."""
    params = SamplingParams(
        max_tokens=np.int64(3),
        temperature=np.float32(0.5),
        top_p=np.float64(0.5),
        stop_token_ids=[np.int32(4), 5],
        logit_bias={np.int64(7): np.float32(1.0)},
    )
    assert type(params.max_tokens) is int
    assert type(params.temperature) is type(params.top_p) is float
    assert params.stop_token_ids == (4, 5)
    assert Decoder(SamplingParams).decode(encode(params)).logit_bias == {7: 1.0}
    assert type(EngineConfig(max_num_seqs=np.int64(3)).max_num_seqs) is int


@pytest.mark.parametrize("value", [0, 0.0])
def test_an_integer_is_a_number(value):
    assert SamplingParams(temperature=value).greedy


def test_lists_and_tuples_stay_what_they_were_given_as():
    """Catches parameters that no longer equal those a caller compares them with."""
    assert SamplingParams(stop=["a"]).stop == ["a"]
    assert SamplingParams(stop_token_ids=range(3)).stop_token_ids == (0, 1, 2)
    assert ServerConfig(served_model_name=["a", "b"]).served_model_name == ("a", "b")
    assert EngineConfig(cache_dir="/x").cache_dir == Path("/x")
