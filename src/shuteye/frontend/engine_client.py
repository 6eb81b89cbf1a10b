"""The callers' side of an engine: requests and control calls on their way, and where their answers go.

Knows nothing of asyncio, threads of its own, or processes; `AsyncEngine` gives it a way to send.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar, cast
from uuid import uuid4

from shuteye.calls import Call, ControlCall
from shuteye.config import EngineConfig
from shuteye.engine.messages import (
    AUTO_WAKE_ID,
    AbortRequests,
    AddRequests,
    Control,
    ErrorReply,
    Failed,
    FromEngine,
    PlainReply,
    Ready,
    SleepReply,
    StateChanged,
    Stepped,
    ToEngine,
    UpdateReply,
    WakeReply,
)
from shuteye.errors import (
    EngineDead,
    EngineNotReady,
    ErrorInfo,
    InvalidRequest,
    ModelSleeping,
    RequestAborted,
    ShuteyeError,
    rebuild,
    refusal,
)
from shuteye.frontend.engine import ServedModel, Status
from shuteye.frontend.forks import tell_forks
from shuteye.frontend.shared_tokenizers import tokenizer_of
from shuteye.heap import return_free_heap
from shuteye.model_info import ModelInfo
from shuteye.state import EngineState, SchedulerStats, WakeReport
from shuteye.tasks.base import Job, TaskOutputs
from shuteye.tasks.table import TASKS, require_job

R = TypeVar("R")
Deliver = Callable[[Any], None]
"""Takes the outputs of one request, of whatever its kind yields, and at last a finished one or a ShuteyeError."""


def _rebuilt(info: ErrorInfo) -> ShuteyeError:
    return rebuild(info.kind, info.message, info.param)


def _promise() -> Future[Any]:
    """A future that will be kept whether or not anyone still waits: whoever gives up waiting cannot cancel it."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future


class EngineClient:
    """Sends requests and calls, and hands every answer to the one who waits for it; thread-safe.

    Args:
        send: delivers a message to the engine, in order, without blocking.
        on_auto_wake: told how each wake ended that the policy began.

    Attributes:
        begun: whether somebody loads the model; until then there is nothing to wait for.
    """

    def __init__(
        self,
        config: EngineConfig,
        send: Callable[[ToEngine], None],
        *,
        on_auto_wake: Callable[[WakeReport | ShuteyeError], None] = lambda _outcome: None,
    ) -> None:
        self.config = config
        self.status: Status = "starting"
        self.failure: ShuteyeError | None = None
        self.state = EngineState()
        self.stats = SchedulerStats()
        self.begun = True
        self.ready: Future[None] = _promise()
        self.on_auto_wake = on_auto_wake
        self._send = send
        self._lock = threading.RLock()
        self._model: ServedModel | None = None
        self._outputs: TaskOutputs[Any]  # there is one as soon as there is a model
        self._deliver: dict[str, Deliver] = {}
        self._calls: dict[int, Future[Any]] = {}
        self._numbers = itertools.count(1)
        tell_forks(self)

    # --- what is known --------------------------------------------------------------------------

    @property
    def model(self) -> ServedModel:
        """The loaded model.

        Raises:
            EngineNotReady: still loading.
            ShuteyeError: the engine is gone.
        """
        if self._model is not None:
            return self._model
        if self.failure is not None:
            raise self.failure
        if not self.begun:
            raise EngineNotReady("The engine was not started: await start(), or use it as an async context manager.")
        raise EngineNotReady("The model is still loading; try again soon (GET /ready tells when).")

    @property
    def request_ids(self) -> tuple[str, ...]:
        """The requests that somebody waits for."""
        with self._lock:
            return tuple(self._deliver)

    # --- sending --------------------------------------------------------------------------------

    def submit(self, job: Job[Any], *, request_id: str | None, deliver: Deliver) -> str:
        """Send a job; `deliver` gets its outputs, and last a finished one or an error. Returns the request's id.

        Raises:
            InvalidRequest: the model is for another task, the job cannot be served, or the id is in use.
            ShuteyeError: the engine is gone.
        """
        self._refuse_if_gone()
        require_job(self.model.info, job)
        job = self._outputs.prepare(job)
        request_id = request_id or uuid4().hex
        with self._lock:
            self._refuse_if_gone()  # once registered, `fail` tells the caller; before, only this does
            if request_id in self._deliver:
                raise InvalidRequest(f"A request with id {request_id!r} is running already.", param="request_id")
            self._deliver[request_id] = deliver
            try:
                requests = self._outputs.add(request_id, job, engine_id=f"{request_id}#{next(self._numbers)}")
                self._send(AddRequests(tuple(requests)))
            except Exception as error:
                self._forget(request_id, deliver)
                raise refusal(error, "The request") from error
        return request_id

    def abort(self, request_id: str, *, deliver: Deliver) -> None:
        """Forget the request that `deliver` waits for and free what it holds; nothing more is delivered for it."""
        engine_ids = self._forget(request_id, deliver)
        if engine_ids and self.status == "ready":
            self._send(AbortRequests(engine_ids))

    def end(self, request_id: str) -> None:
        """End a request early: its last output, with finish reason "abort", is delivered. Unknown ids are ignored."""
        with self._lock:
            engine_ids = self._outputs.engine_ids(request_id) if self._model else ()
        if engine_ids and self.status == "ready":
            self._send(AbortRequests(engine_ids))

    def call(self, call: Call[R]) -> Future[R]:
        """Send a control call; the future gets its report, or a ShuteyeError."""
        future: Future[R] = _promise()
        with self._lock:
            self._refuse_if_gone()
            call_id = next(self._numbers)
            self._calls[call_id] = future
        try:
            self._send(Control(call_id, cast(ControlCall, call)))
        except Exception as error:
            self._calls.pop(call_id, None)
            raise refusal(error, "The call") from error
        return future

    def _forget(self, request_id: str, deliver: Deliver) -> tuple[str, ...]:
        """The engine-side ids of a request nobody follows any more; none if it ended, even if its id was reused."""
        with self._lock:
            if self._deliver.get(request_id) != deliver:
                return ()
            del self._deliver[request_id]
            return tuple(self._outputs.abort(request_id))

    def _refuse_if_gone(self) -> None:
        if self.failure is not None:
            raise self.failure
        if self.status == "starting":
            _ = self.model  # raises

    # --- receiving ------------------------------------------------------------------------------

    def on_message(self, message: FromEngine) -> None:
        """Take one message from the engine, in the order they were sent; what comes after the end is ignored."""
        try:
            self._take(message)
        except Exception as error:  # a bug of ours: nobody would be told anything from here on
            self.fail(EngineDead(f"Listening to the engine ended: {type(error).__name__}: {error}"), status="dead")
            raise

    def _take(self, message: FromEngine) -> None:
        match message:
            case Stepped(deltas, stats, started):
                self.stats = stats
                if started and self._model is not None:
                    with self._lock:
                        self._outputs.note_started(started)
                self._on_deltas(deltas)
            case StateChanged(state):
                self.state = state
            case Ready(info, config):
                self._on_ready(info, config)
            case Failed(error):
                self.fail(_rebuilt(error), status="failed")
            case WakeReply(call_id, report) if call_id == AUTO_WAKE_ID:
                self.on_auto_wake(report)
            case ErrorReply(call_id, error) if call_id == AUTO_WAKE_ID:
                self.on_auto_wake(_rebuilt(error))
            case ErrorReply(call_id, error):
                if (refused := self._calls.pop(call_id, None)) is not None:
                    refused.set_exception(_rebuilt(error))
            case (
                SleepReply(call_id, report)
                | WakeReply(call_id, report)
                | UpdateReply(call_id, report)
                | PlainReply(call_id, report)
            ):
                if (answered := self._calls.pop(call_id, None)) is not None:
                    answered.set_result(report)

    def _on_ready(self, info: ModelInfo, config: EngineConfig) -> None:
        try:
            tokenizer = tokenizer_of(info.tokenizer_dir, chat_template=config.chat_template)
            return_free_heap()  # reading its file took as much again
        except ShuteyeError as error:
            self.fail(error, status="failed")
            return
        with self._lock:
            if self.failure is not None:  # closed while loading
                return
            self._outputs = TASKS[info.task].open_outputs(info, tokenizer, self._why_aborted)
            self._model = ServedModel(info, tokenizer)
            self.config, self.status = config, "ready"
        self.ready.set_result(None)

    def _why_aborted(self) -> ErrorInfo:
        """What to tell who waits for a result that no longer comes; the state was pushed before the abort."""
        if self.state.is_sleeping:
            return ErrorInfo(ModelSleeping.__name__, ModelSleeping.MESSAGE)
        return ErrorInfo(RequestAborted.__name__, "The request was ended before there was a result; send it again.")

    def _on_deltas(self, deltas: Sequence[Any]) -> None:
        with self._lock:
            if self.failure is not None:
                return
            processed = self._outputs.process(deltas)
            deliveries: list[tuple[Deliver, object]] = []
            for output in processed.outputs:
                deliver = self._deliver.pop if output.finished else self._deliver.get
                waiting = deliver(output.request_id, None)
                if waiting is not None:
                    deliveries.append((waiting, output))
            for request_id, error in processed.errors:
                waiting = self._deliver.pop(request_id, None)
                if waiting is not None:
                    deliveries.append((waiting, _rebuilt(error)))
        if processed.aborts:
            self._send(AbortRequests(tuple(processed.aborts)))
        for deliver_to, item in deliveries:
            deliver_to(item)

    def fail(self, error: ShuteyeError, *, status: Status) -> None:
        """The engine is gone: everyone who waits gets `error`, and so does whoever comes later."""
        with self._lock:
            if self.failure is not None:
                return
            self.failure, self.status = error, status
            deliveries, self._deliver = list(self._deliver.values()), {}
            calls, self._calls = list(self._calls.values()), {}
        for deliver in deliveries:
            deliver(error)
        for future in calls:
            future.set_exception(error)
        if not self.ready.done():
            self.ready.set_exception(error)

    def leave_to_parent(self, reason: EngineDead) -> None:
        """See `forks.Inherited`: those who wait are in the parent, and are not told."""
        self._lock = threading.RLock()  # another thread may have held it, which no fork has
        self.failure, self.status = reason, "dead"
