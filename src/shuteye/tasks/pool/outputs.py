"""Turns what the engine did for jobs to embed or score into their outputs: rows of numbers, whatever they mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from shuteye.errors import ErrorInfo
from shuteye.tasks.base import Delta, Job, Processed, RequestDelta, TaskOutputs
from shuteye.tasks.pool.requests import PooledDelta, PooledOutput, PoolingParams, PoolInput, PoolRequest


@dataclass(frozen=True, slots=True)
class PoolingJob(Job[PooledOutput]):
    """Inputs to embed or score, all at once."""

    inputs: tuple[PoolInput, ...]
    params: PoolingParams


class PoolOutputs(TaskOutputs[PoolingJob]):
    """Follows jobs by their names in the engine. One per engine client.

    Args:
        why_aborted: the error that an aborted request ends with, asked for at that moment.
    """

    def __init__(self, *, why_aborted: Callable[[], ErrorInfo]) -> None:
        self._why_aborted = why_aborted
        self._engine_ids: dict[str, str] = {}  # by the caller's id
        self._request_ids: dict[str, str] = {}  # by the engine's
        self._scheduled_at: dict[str, float] = {}  # by the engine's

    def add(self, request_id: str, job: PoolingJob, *, engine_id: str) -> list[PoolRequest]:
        """Follow a job; what to submit to the engine."""
        self._engine_ids[request_id] = engine_id
        self._request_ids[engine_id] = request_id
        return [PoolRequest(engine_id, job.inputs, job.params)]

    def process(self, deltas: Iterable[Delta]) -> Processed:
        """Take what the engine did; deltas of requests that are not followed (any more) are ignored."""
        outputs: list[PooledOutput] = []
        errors: list[tuple[str, ErrorInfo]] = []
        for delta in deltas:
            request_id = self._request_ids.get(delta.request_id)
            if request_id is None:
                continue
            scheduled_at = self._scheduled_at.get(delta.request_id)
            self.abort(request_id)
            if isinstance(delta, PooledDelta):
                outputs.append(PooledOutput(request_id, delta.rows, scheduled_at=scheduled_at))
            elif isinstance(delta, RequestDelta):
                errors.append((request_id, delta.error or self._why_aborted()))
        return Processed(outputs=tuple(outputs), errors=tuple(errors))

    def note_started(self, started: Iterable[tuple[str, float]]) -> None:
        """Requests got their first inputs into a batch, each at its monotonic second."""
        for engine_id, at in started:
            if engine_id in self._request_ids:
                self._scheduled_at.setdefault(engine_id, at)

    def abort(self, request_id: str) -> list[str]:
        """Stop following a request, if it is known; the engine-side ids to abort."""
        engine_id = self._engine_ids.pop(request_id, None)
        if engine_id is None:
            return []
        del self._request_ids[engine_id]
        self._scheduled_at.pop(engine_id, None)
        return [engine_id]

    def engine_ids(self, request_id: str) -> tuple[str, ...]:
        """The engine-side ids of a request; none if it is not known."""
        engine_id = self._engine_ids.get(request_id)
        return () if engine_id is None else (engine_id,)
