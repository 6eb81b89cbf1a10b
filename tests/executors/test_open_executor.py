"""Ranks that this version does not serve."""

import pytest

from shuteye import EngineConfig
from shuteye.errors import InvalidRequest
from shuteye.executors import open_executor


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tensor_parallel_size", 2),
        ("pipeline_parallel_size", 3),
        ("distributed_executor_backend", "ray"),
        ("distributed_executor_backend", "mp"),
    ],
)
def test_the_setting_that_is_not_supported_is_named(name, value):
    """Would catch an error about the backend for two ranks, or about ranks for a backend."""
    with pytest.raises(InvalidRequest, match=f"{name} {value!r} is not supported yet") as refused:
        open_executor(EngineConfig(**{name: value}))
    assert refused.value.param == name
