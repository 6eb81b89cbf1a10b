"""Which executor serves a config, and what none does."""

import pytest

from shuteye import EngineConfig
from shuteye.errors import InvalidRequest
from shuteye.executors import open_executor


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"distributed_executor_backend": "ray"}, "'ray' is not supported yet"),
        ({"distributed_executor_backend": "ray", "tensor_parallel_size": 2}, "'ray' is not supported yet"),
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
