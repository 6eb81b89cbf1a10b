"""Which executor serves a config, and what none does."""

import sys

import pytest

from shuteye import EngineConfig
from shuteye.errors import InvalidRequest
from shuteye.executors import open_executor


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"distributed_executor_backend": "inproc", "pipeline_parallel_size": 3}, "serves one rank, and 3 are wanted"),
        ({"distributed_executor_backend": "inproc", "tensor_parallel_size": 2}, "serves one rank, and 2 are wanted"),
    ],
)
def test_a_backend_that_cannot_serve_so_many_ranks_is_named(settings, says):
    """Would catch two ranks that are taken for one, and an error that does not say what to do instead."""
    with pytest.raises(InvalidRequest, match=says) as refused:
        open_executor(EngineConfig(**settings))
    assert refused.value.param == "distributed_executor_backend"
    assert "use 'mp', or leave it out" in refused.value.message


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_ray_that_is_not_installed_is_refused_by_name(num_ranks, monkeypatch):
    """Would catch an ImportError of something that nobody has asked for."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InvalidRequest, match=r"pip install 'shuteye\[ray\]'") as refused:
        open_executor(EngineConfig(distributed_executor_backend="ray", tensor_parallel_size=num_ranks))
    assert refused.value.param == "distributed_executor_backend"
