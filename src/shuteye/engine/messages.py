"""What passes between an engine and the side that its callers are on, in one process or two.

Knows nothing of transport; frozen tagged Structs, so that msgspec can type them on the wire.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import msgspec

from shuteye.config import EngineConfig
from shuteye.errors import ErrorInfo, InvalidRequest
from shuteye.model_info import ModelInfo
from shuteye.state import EngineState, SchedulerStats, SleepReport, UpdateReport, VerifyMode, WakeReport
from shuteye.tasks.base import Delta
from shuteye.tasks.table import Request

# --- control calls ------------------------------------------------------------------------------


class SleepCall(msgspec.Struct, frozen=True, tag=True):
    """`sleep(level, tags, mode)`; None means the default."""

    level: int = 1
    tags: tuple[str, ...] | None = None
    mode: str | None = None
    timeout_s: float | None = None


class WakeCall(msgspec.Struct, frozen=True, tag=True):
    """`wake_up(tags)`; None means every tag.

    `for_requests`: they alone asked for it, and the canary goes with their first step.
    """

    tags: tuple[str, ...] | None = None
    for_requests: bool = False


class PauseCall(msgspec.Struct, frozen=True, tag=True):
    """`pause(mode)`."""

    mode: str | None = None
    timeout_s: float | None = None


class ResumeCall(msgspec.Struct, frozen=True, tag=True):
    """`resume()`."""


class UpdateCall(msgspec.Struct, frozen=True, tag=True):
    """`update_weights`: from a safetensors file, or from tensors when caller and engine share a process."""

    path: str | None = None
    named_tensors: Any = None


class ReloadCall(msgspec.Struct, frozen=True, tag=True):
    """`reload_weights(path)`; None means the image that was loaded last."""

    path: str | None = None


class ResetPrefixCacheCall(msgspec.Struct, frozen=True, tag=True):
    """`reset_prefix_cache()`."""


class RpcCall(msgspec.Struct, frozen=True, tag=True):
    """`collective_rpc(verb, args)`: a worker verb on every rank; see `engine.rpc`."""

    verb: str
    args: tuple[Any, ...] = ()


def tag_names(tags: Sequence[str] | None) -> tuple[str, ...] | None:
    """Tags as they travel. One string is refused, or its letters would be taken for tags."""
    if isinstance(tags, str):
        raise InvalidRequest(f"tags must be a list of strings, got {tags!r}.", param="tags")
    return None if tags is None else tuple(tags)


ControlCall = SleepCall | WakeCall | PauseCall | ResumeCall | UpdateCall | ReloadCall | ResetPrefixCacheCall | RpcCall

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
    """The answer to an UpdateCall or ReloadCall."""

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


_NO_ARGUMENTS: tuple[tuple[Any, ...], ...] = ((),)

RPC_VERBS: Mapping[str, tuple[tuple[Any, ...], ...]] = {
    "facts": _NO_ARGUMENTS,
    "missing": _NO_ARGUMENTS,
    "residual_bytes": _NO_ARGUMENTS,
    "states": _NO_ARGUMENTS,
    "verify": tuple((mode,) for mode in get_args(VerifyMode)),
    "weights_source": _NO_ARGUMENTS,
}


def check_rpc(verb: str, args: tuple[Any, ...]) -> None:
    """Refuse what may not be called.

    Raises:
        InvalidRequest: names the verbs, or the arguments, that may be used.
    """
    allowed = RPC_VERBS.get(verb)
    if allowed is None:
        raise InvalidRequest(
            f"collective_rpc cannot call {verb!r}; it can call {', '.join(RPC_VERBS)}.", param="method"
        )
    if args not in allowed:
        listed = " or ".join(str(list(one)) for one in allowed)
        raise InvalidRequest(f"args of {verb!r} must be {listed}, got {list(args)}.", param="args")
