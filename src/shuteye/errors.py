"""Every exception shuteye raises, and the HTTP status each one answers with.

Knows nothing of HTTP libraries: `server/http/errors.py` turns these into OpenAI-shaped bodies.

    ShuteyeError
    ├── ClientError                     the caller can fix it (4xx)
    │   ├── InvalidRequest              400  a bad value; `param` names the field
    │   │   ├── PromptTooLong           400  the request can never fit
    │   │   └── UnsupportedModel        400  the checkpoint cannot be served correctly
    │   ├── AuthenticationFailed        401
    │   ├── PermissionRefused           403
    │   ├── ModelNotFound               404
    │   ├── ResponseNotFound            404  no response is kept
    │   ├── SleepModeDisabled           404  a sleep call without `enable_sleep_mode`
    │   ├── TransitionConflict          409  the transition table forbids the move
    │   └── LeaseGone                   410  a lease that has ended, or never was
    └── ServerError                     the server or the machine is at fault (5xx)
        ├── InternalError               500  a bug of ours
        ├── SleepFailed                 503  rolled back: still awake
        ├── WakeFailed                  503  rolled back: still asleep
        │   └── VerificationFailed      503  the memory is not what it was
        ├── ModelSleeping               503  weights are needed and are not resident
        ├── ModelPaused                 503  a pause is in force that takes no new requests
        ├── RequestAborted              503  ended before there was a result
        ├── DrainTimeout                503  requests still running at the deadline of `mode=wait`
        ├── QueueFull                   503
        ├── EngineNotReady              503  still loading
        ├── ServerStopping              503  told to stop: what runs is finished, nothing new is begun
        ├── EngineFaulted               503  a transition could not be rolled back
        │   └── RankLost                503  a rank has died, or was killed as it did not answer
        ├── EngineDead                  503  the engine process is gone
        │   └── DescriptorsExhausted    503  it cannot be started for want of file descriptors, a retry may work
        ├── GroupAborted                503  a rank waited for others that died, came too late or gave up
        ├── EngineHung                  503  it gives no sign of life, and may go on or must be restarted
        ├── MemoryExhausted             503  the system will not give the bytes
        ├── BackendFailure              503  a call to the kernel or driver failed
        ├── ImageFailure                503  a weight image is damaged, busy or unreadable
        ├── ReplicasFailed              503  some of several replicas did not carry out a call; the message names them
        └── ServerUnreachable           503  nothing answers at the address (raised by `client`)
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


class ShuteyeError(Exception):
    """Base of all errors raised on purpose. `message` says what was seen, expected, and to do."""

    status_code: ClassVar[int] = 500
    error_type: ClassVar[str] = "InternalServerError"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class ClientError(ShuteyeError):
    """The caller can fix it."""

    status_code = 400
    error_type = "BadRequestError"


class InvalidRequest(ClientError):
    """A bad value; `param` names the field."""


class PromptTooLong(InvalidRequest):
    """The request can never fit this engine's context or KV cache."""


class UnsupportedModel(InvalidRequest):
    """The checkpoint cannot be served correctly; the message says why."""


class AuthenticationFailed(ClientError):
    """A key is required and none, or a wrong one, was given."""

    status_code = 401
    error_type = "AuthenticationError"


class PermissionRefused(ClientError):
    """The key is known but does not open this route."""

    status_code = 403
    error_type = "PermissionDeniedError"


class ModelNotFound(ClientError):
    """No such model, file, alias or served name."""

    status_code = 404
    error_type = "NotFoundError"


class ResponseNotFound(ClientError):
    """A response was asked for by its id, and none is kept."""

    status_code = 404
    error_type = "NotFoundError"


class SleepModeDisabled(ClientError):
    """A sleep call on an engine that was not started with `enable_sleep_mode`."""

    status_code = 404
    error_type = "NotFoundError"


class TransitionConflict(ClientError):
    """The transition table forbids this move from the current state."""

    status_code = 409
    error_type = "ConflictError"


class LeaseGone(ClientError):
    """A lease of memory has ended, or never was; what it held may belong to others by now."""

    status_code = 410
    error_type = "LeaseGoneError"


class ServerError(ShuteyeError):
    """The server or the machine is at fault."""


class InternalError(ServerError):
    """A bug of ours."""


class SleepFailed(ServerError):
    """Going to sleep failed and was rolled back: the model is still awake."""

    status_code = 503
    error_type = "SleepFailedError"


class WakeFailed(ServerError):
    """Waking failed and was rolled back: the model is still asleep. The message says whether a retry may work."""

    status_code = 503
    error_type = "WakeFailedError"


class VerificationFailed(WakeFailed):
    """The woken memory is not what was put to sleep (checksum or canary)."""

    error_type = "VerificationFailedError"


CANARY_DISAGREES = "The canary's logits are not finite, or not those recorded when the weights were last known good."


class ModelSleeping(ServerError):
    """The weights are needed and are not resident."""

    MESSAGE: ClassVar[str] = "Model is currently in sleep mode. Please wake it up first with a POST request to /wake_up"
    status_code = 503
    error_type = "ModelSleepingError"

    def __init__(self, message: str = MESSAGE, *, param: str | None = None) -> None:
        super().__init__(message, param=param)


class ModelPaused(ServerError):
    """A pause with `mode="abort"` or `"wait"` is in force, which takes no new requests."""

    MESSAGE: ClassVar[str] = "The model is paused and takes no new requests until it is resumed: POST /resume."
    status_code = 503
    error_type = "ServiceUnavailableError"  # vLLM's

    def __init__(self, message: str = MESSAGE, *, param: str | None = None) -> None:
        super().__init__(message, param=param)


class RequestAborted(ServerError):
    """The request was ended, as by a pause with `mode="abort"`, before there was a result."""

    status_code = 503
    error_type = "RequestAbortedError"


class DrainTimeout(ServerError):
    """Requests were still running at the deadline of `mode="wait"`; the model stays awake."""

    status_code = 503
    error_type = "DrainTimeoutError"


class QueueFull(ServerError):
    """As many requests are held, or wait, as may."""

    status_code = 503
    error_type = "QueueFullError"


class EngineNotReady(ServerError):
    """The engine is still loading."""

    status_code = 503
    error_type = "EngineNotReadyError"


class ServerStopping(ServerError):
    """The server was told to stop: it finishes what runs, and begins nothing new."""

    status_code = 503
    error_type = "ServerStoppingError"


class EngineFaulted(ServerError):
    """A transition could not be rolled back; nothing is served until the engine is recovered."""

    status_code = 503
    error_type = "EngineFaultedError"


class RankLost(EngineFaulted):
    """A rank has died, or was killed because it did not answer; `wake_up` starts another in its place."""

    error_type = "RankLostError"


class EngineDead(ServerError):
    """The engine process ended while requests needed it."""

    status_code = 503
    error_type = "EngineDeadError"


class DescriptorsExhausted(EngineDead):
    """The engine process cannot be started, as there are no file descriptors left; a later start may work."""

    error_type = "DescriptorsExhaustedError"


class GroupAborted(ServerError):
    """The communication group of a model's ranks has ended, as one died, was late or gave up; or it refuses a rank.

    Attributes:
        by: the rank that ended it; None for the engine, or if unknown.
        missing: ranks that had not come when a deadline passed.
    """

    status_code = 503
    error_type = "GroupAbortedError"

    def __init__(
        self, message: str, *, param: str | None = None, by: int | None = None, missing: Sequence[int] = ()
    ) -> None:
        super().__init__(message, param=param)
        self.by = by
        self.missing = tuple(missing)


class EngineHung(ServerError):
    """The engine process gives no sign of life, or is stuck in one step; it may go on, or must be restarted."""

    status_code = 503
    error_type = "EngineHungError"


class MemoryExhausted(ServerError):
    """The system will not give the bytes asked for."""

    status_code = 503
    error_type = "MemoryExhaustedError"


class BackendFailure(ServerError):
    """A call to the kernel or the driver failed."""

    status_code = 503
    error_type = "BackendFailureError"


class ImageFailure(ServerError):
    """A weight image is damaged, busy or unreadable."""

    status_code = 503
    error_type = "ImageFailureError"


class ReplicasFailed(ServerError):
    """Some replicas of an application did not carry out a call that the others did; the message names them."""

    status_code = 503
    error_type = "ReplicasFailedError"


class ServerUnreachable(ServerError):
    """Nothing answers at the server's address, or not in time."""

    status_code = 503
    error_type = "ServerUnreachableError"


def _all_errors(root: type[ShuteyeError]) -> dict[str, type[ShuteyeError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= _all_errors(child)
    return found


_BY_NAME = _all_errors(ShuteyeError)


def rebuild(kind: str, message: str, param: str | None = None) -> ShuteyeError:
    """The error that another process named by class name `kind`; `InternalError` if unknown to us."""
    return _BY_NAME.get(kind, InternalError)(message, param=param)


def info_of(error: ShuteyeError) -> ErrorInfo:
    """An error as it travels between processes."""
    return ErrorInfo(kind=type(error).__name__, message=error.message, param=error.param)


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """An error on its way between processes; `errors.rebuild` makes the exception again."""

    kind: str
    message: str
    param: str | None = None


logger = logging.getLogger(__name__)


def refusal(error: BaseException, what: str, *, param: str | None = None) -> ShuteyeError:
    """The error that refuses a request over which `error` was raised.

    Args:
        what: the part of the request that was being looked at, or done; begins the message.
        param: the caller's field, if one is known.
    """
    match error:
        case ShuteyeError():
            return error
        case RecursionError():
            return InvalidRequest(f"{what} is nested too deeply.", param=param)
        case UnicodeError():
            return InvalidRequest(
                f"{what} has a text that is no Unicode, such as a lone surrogate: {error}.", param=param
            )
        case OverflowError():
            return InvalidRequest(f"{what} has a number that is too large: {error}.", param=param)
    logger.error("%s failed because of a bug of ours; its request is refused.", what, exc_info=error)
    return InternalError(f"{what} failed: {type(error).__name__}: {error}")
