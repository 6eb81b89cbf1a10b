"""What passes between an engine and the side that its callers are on, in one process or two.

Frozen tagged Structs, so that msgspec can type them on the wire.
"""

from __future__ import annotations

from typing import Any

import msgspec

from shuteye.calls import ControlCall
from shuteye.config import EngineConfig
from shuteye.errors import ErrorInfo
from shuteye.model_info import ModelInfo
from shuteye.state import EngineState, SchedulerStats, SleepReport, UpdateReport, WakeReport
from shuteye.tasks.base import Delta
from shuteye.tasks.table import Request

# --- to the engine ------------------------------------------------------------------------------


class AddRequests(msgspec.Struct, frozen=True, tag=True):
    """Sequences to generate, or whatever else the model's task is."""

    requests: tuple[Request, ...]


class AbortRequests(msgspec.Struct, frozen=True, tag=True):
    """Sequences nobody waits for any more."""

    request_ids: tuple[str, ...]


class Control(msgspec.Struct, frozen=True, tag=True):
    """A control call; exactly one reply carries its `call_id`."""

    call_id: int
    call: ControlCall


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """End the engine loop."""


ToEngine = AddRequests | AbortRequests | Control | Shutdown

# --- from the engine ----------------------------------------------------------------------------


class Connected(msgspec.Struct, frozen=True, tag=True):
    """The first word of an engine process: both sides of the socket are there."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Loaded: the model's facts and the completed config."""

    info: ModelInfo
    config: EngineConfig


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Loading failed; nothing follows."""

    error: ErrorInfo


class Stepped(msgspec.Struct, frozen=True, tag=True):
    """What a step did. `started` are the sequences that got their place in the batch, and when (monotonic seconds)."""

    deltas: tuple[Delta, ...]
    stats: SchedulerStats
    started: tuple[tuple[str, float], ...] = ()


class StateChanged(msgspec.Struct, frozen=True, tag=True):
    """The sleep state, pushed whenever it changes."""

    state: EngineState


AUTO_WAKE_ID = 0
"""The `call_id` of a reply to what nobody called: a wake by policy."""


class SleepReply(msgspec.Struct, frozen=True, tag=True):
    """The answer to a SleepCall."""

    call_id: int
    report: SleepReport


class WakeReply(msgspec.Struct, frozen=True, tag=True):
    """The answer to a WakeCall."""

    call_id: int
    report: WakeReport


class UpdateReply(msgspec.Struct, frozen=True, tag=True):
    """The answer to a call that writes weights."""

    call_id: int
    report: UpdateReport


class PlainReply(msgspec.Struct, frozen=True, tag=True):
    """The answer to any other call."""

    call_id: int
    report: Any = None


class ErrorReply(msgspec.Struct, frozen=True, tag=True):
    """A call that failed."""

    call_id: int
    error: ErrorInfo


Reply = SleepReply | WakeReply | UpdateReply | PlainReply | ErrorReply
FromEngine = Connected | Ready | Failed | Stepped | StateChanged | Reply


def reply_with(call_id: int, report: object) -> Reply:
    """The reply that can carry `report` with its type."""
    match report:
        case SleepReport():
            return SleepReply(call_id, report)
        case WakeReport():
            return WakeReply(call_id, report)
        case UpdateReport():
            return UpdateReply(call_id, report)
    return PlainReply(call_id, report)
