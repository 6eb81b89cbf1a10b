"""One rank in this very process: the executor of a single CPU or GPU.

Torch is imported with the worker, not before.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from shuteye.config import EngineConfig
from shuteye.errors import InternalError, ShuteyeError
from shuteye.executors import Executor
from shuteye.memory.backends import MemoryBackend
from shuteye.tasks.table import Plan, Result
from shuteye.worker import VERBS, Worker


def _translated(verb: str, error: Exception) -> ShuteyeError:
    """A rank's own bug must not slip past those who roll back: every error leaves here as one of ours."""
    if isinstance(error, ShuteyeError):
        return error
    translated = InternalError(f"{verb} failed on rank 0: {type(error).__name__}: {error}")
    translated.__cause__ = error
    return translated


class InprocExecutor(Executor):
    """Calls a worker directly."""

    def __init__(self, config: EngineConfig, *, backend: MemoryBackend | None = None) -> None:
        self._worker = Worker(config, backend=backend)

    def execute(self, plan: Plan) -> Result:
        """Run one step; see `Executor.execute`."""
        try:
            return self._worker.execute(plan)
        except Exception as error:
            raise _translated("execute", error) from error

    def outcomes(self, verb: str, *args: Any, ranks: Collection[int] | None = None) -> dict[int, Any]:
        """Call a verb on the one rank; see `Executor.outcomes`."""
        assert verb in VERBS, f"{verb!r} is not a verb of the worker"
        try:
            return {0: self._worker.call(verb, *args)}
        except Exception as error:  # noqa: BLE001 (it is raised by whoever looks)
            return {0: _translated(verb, error)}

    def close(self) -> None:
        """Give back the rank's memory."""
        self._worker.close()
