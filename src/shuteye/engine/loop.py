"""The loop around an engine core: messages in, steps, messages out.

Knows nothing of what carries the messages; a `Channel` does, in a thread or between processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from shuteye.config import EngineConfig
from shuteye.engine.core import EngineCore
from shuteye.engine.messages import (
    AUTO_WAKE_ID,
    AbortRequests,
    AddRequests,
    Control,
    ErrorReply,
    Failed,
    FromEngine,
    Ready,
    Shutdown,
    StateChanged,
    Stepped,
    ToEngine,
    reply_with,
)
from shuteye.engine.transitions import Report
from shuteye.errors import ShuteyeError, info_of
from shuteye.executors import open_executor
from shuteye.state import EngineState, SchedulerStats
from shuteye.tasks.base import Delta


class Channel(Protocol):
    """The engine's end of whatever connects it to its callers."""

    def receive(self, timeout_s: float | None) -> Sequence[ToEngine]:
        """Everything that has arrived; waits up to `timeout_s` (None: for ever) for the first message."""
        ...

    def send(self, message: FromEngine) -> None:
        """Deliver a message in order, without blocking."""
        ...

    def wake(self) -> None:
        """Let `receive` return, with or without messages; from any thread."""
        ...


def run_engine(config: EngineConfig, channel: Channel) -> None:
    """Load, announce, and serve until told to shut down; a failure to load is announced instead."""
    try:
        executor = open_executor(config)
        try:
            core = EngineCore(config, executor)
            loop = _Loop(core, channel)
            executor.on_failure(channel.wake)
            loop.push_state()  # whoever learns that the engine is ready finds its state
            channel.send(Ready(core.info, core.config))
            loop.run()
        finally:
            executor.close()
    except ShuteyeError as error:
        channel.send(Failed(info_of(error)))


class _Loop:
    def __init__(self, core: EngineCore, channel: Channel) -> None:
        self._core = core
        self._channel = channel
        self._pushed: EngineState | None = None
        self._told = SchedulerStats()
        self._running = True
        core.on_fault(self.push_state)  # health probes are not to wait for ranks that are still at work

    def run(self) -> None:
        self._tell([])
        while True:
            for message in self._channel.receive(self._poll_timeout_s()):
                self._handle(message)
            if not self._running:
                return
            deltas = self._core.step()
            for outcome in self._core.take_auto_wakes():
                self._answer(AUTO_WAKE_ID)(outcome)
            self.push_state()
            self._tell(deltas)

    def _poll_timeout_s(self) -> float | None:
        """How long there is nothing to do but listen."""
        if self._core.can_step:
            return 0.0
        deadline = self._core.next_deadline
        return None if deadline is None else max(0.0, deadline - time.monotonic())

    def _handle(self, message: ToEngine) -> None:
        match message:
            case AddRequests(requests):
                for request in requests:
                    self._core.add(request)
            case AbortRequests(request_ids):
                self._core.abort(request_ids)
            case Control(call_id, call):
                self._core.submit(call, self._answer(call_id))
            case Shutdown():
                self._running = False

    def _answer(self, call_id: int) -> Callable[[Report | ShuteyeError], None]:
        def answer(outcome: Report | ShuteyeError) -> None:
            self.push_state()  # whoever reads the answer finds the state that goes with it
            if isinstance(outcome, ShuteyeError):
                self._channel.send(ErrorReply(call_id, info_of(outcome)))
            else:
                self._channel.send(reply_with(call_id, outcome))

        return answer

    def _tell(self, deltas: Sequence[Delta]) -> None:
        """Send what a step did, if it did anything that can be seen."""
        stats = self._core.stats
        if deltas or stats != self._told:
            self._told = stats
            self._channel.send(Stepped(tuple(deltas), stats, self._core.take_started()))

    def push_state(self) -> None:
        """Send the sleep state if it is not what was sent last."""
        state = self._core.state
        if state != self._pushed:
            self._pushed = state
            self._channel.send(StateChanged(state))
