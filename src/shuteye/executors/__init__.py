"""The seam between the engine core and its workers: run a step, call a verb on every rank."""

from __future__ import annotations

from shuteye.config import EngineConfig
from shuteye.errors import InvalidRequest
from shuteye.executors.base import Executor


def open_executor(config: EngineConfig) -> Executor:
    """The executor that the config names, its ranks loaded: the first time that makes the image, which takes longer.

    Raises:
        ShuteyeError: loading failed.
        InvalidRequest: more ranks than one, or elsewhere than here, which no executor serves yet.
    """
    one_rank = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "distributed_executor_backend": "inproc"}
    for name, served in one_rank.items():
        wanted = getattr(config, name)
        if wanted != served:
            raise InvalidRequest(
                f"{name} {wanted!r} is not supported yet, as this version serves one rank: expected {served!r}.",
                param=name,
            )
    from shuteye.executors.inproc import InprocExecutor

    return InprocExecutor(config)
