"""One rank in this very process: the executor of a single CPU or GPU.

Torch is imported with the worker, not before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from shuteye.config import EngineConfig
from shuteye.errors import InternalError, ShuteyeError
from shuteye.memory.backends import MemoryBackend
from shuteye.tasks.table import Plan, Result
from shuteye.worker import VERBS, Worker


@contextlib.contextmanager
def _translated(verb: str) -> Iterator[None]:
    """A rank's own bug must not slip past those who roll back: every error leaves here as one of ours."""
    try:
        yield
    except ShuteyeError:
        raise
    except Exception as error:
        raise InternalError(f"{verb} failed on rank 0: {type(error).__name__}: {error}") from error


class InprocExecutor:
    """Calls a worker directly."""

    def __init__(self, config: EngineConfig, *, backend: MemoryBackend | None = None) -> None:
        self._worker = Worker(config, backend=backend)

    def execute(self, plan: Plan) -> Result:
        """Run one step; see `Executor.execute`."""
        with _translated("execute"):
            return self._worker.execute(plan)

    def call(self, verb: str, *args: Any) -> list[Any]:
        """Call a verb on the one rank; see `Executor.call`."""
        assert verb in VERBS, f"{verb!r} is not a verb of the worker"
        with _translated(verb):
            return [self._worker.call(verb, *args)]

    def close(self) -> None:
        """Give back the rank's memory."""
        self._worker.close()
