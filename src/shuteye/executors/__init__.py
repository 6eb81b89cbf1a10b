"""The seam between the engine core and its ranks: run a step, call a verb on every rank.

Knows nothing of how a rank is reached; `inproc` is the executor of one rank, others have the same three verbs.
"""

from __future__ import annotations

from typing import Any, Protocol

from shuteye.config import EngineConfig
from shuteye.errors import InvalidRequest
from shuteye.tasks.table import Plan, Result


class Executor(Protocol):
    """One or more ranks that act as one."""

    def execute(self, plan: Plan) -> Result:
        """Run one step on every rank and return what came of it: the result that goes with the plan's type.

        Raises:
            ShuteyeError: the step failed; no rank advanced its requests.
        """
        ...

    def call(self, verb: str, *args: Any) -> list[Any]:
        """Call one of `worker.VERBS` on every rank; the answers in rank order.

        Raises:
            ShuteyeError: a rank refused; every rank has answered before this is raised.
        """
        ...

    def close(self) -> None:
        """End every rank and give back its memory; idempotent."""
        ...


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
