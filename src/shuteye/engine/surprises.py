"""What becomes of an exception that nobody foresaw where a request enters: it refuses that request, and no other.

Knows nothing of requests. The boundaries are few: `Frontend._begin`, `ProcessLink.post`, `EngineCore.add`, and in
`Grammars` whatever is done for a single request. A step of the whole batch is none: what an invariant broken there
means for the other requests nobody can tell, so that it ends the engine, as it should.
"""

from __future__ import annotations

import logging

from shuteye.errors import InternalError, InvalidRequest, ShuteyeError

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
