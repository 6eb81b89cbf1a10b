"""The seam between the engine core and its workers: run a step, call a verb on every rank."""

from __future__ import annotations

from shuteye.config import EngineConfig
from shuteye.errors import InvalidRequest
from shuteye.executors.base import Executor


def open_executor(config: EngineConfig) -> Executor:
    """The executor that the config names, its ranks loaded: the first time that makes the image, which takes longer.

    Raises:
        ShuteyeError: loading failed.
        InvalidRequest: more ranks than one, which no executor here serves yet.
    """
    num_ranks = config.tensor_parallel_size * config.pipeline_parallel_size
    if num_ranks != 1 or config.distributed_executor_backend != "inproc":
        raise InvalidRequest(
            f"{num_ranks} ranks on {config.distributed_executor_backend!r} were asked for, expected 1 on 'inproc': "
            "this version serves one rank.",
            param="distributed_executor_backend",
        )
    from shuteye.executors.inproc import InprocExecutor

    return InprocExecutor(config)
