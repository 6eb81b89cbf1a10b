"""What a server's error answers mean: the exception each one stands for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from shuteye.errors import (
    AuthenticationFailed,
    ClientError,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    ModelSleeping,
    PermissionRefused,
    ServerError,
    ShuteyeError,
    TransitionConflict,
)

_SHARED_TYPES: Mapping[str, type[ShuteyeError]] = {
    "BadRequestError": InvalidRequest,
    "NotFoundError": ModelNotFound,
    "InternalServerError": InternalError,
}
"""Types that several classes answer with: the class that promises no more than the type says."""

_BY_STATUS: Mapping[int, type[ShuteyeError]] = {
    400: InvalidRequest,
    401: AuthenticationFailed,
    403: PermissionRefused,
    404: ModelNotFound,
    409: TransitionConflict,
    500: InternalError,
}
"""For answers that are not ours, such as a proxy's."""


def _subclasses(root: type[ShuteyeError]) -> Iterator[type[ShuteyeError]]:
    for child in root.__subclasses__():
        yield child
        yield from _subclasses(child)


_BY_TYPE = {kind.error_type: kind for kind in _subclasses(ShuteyeError)} | dict(_SHARED_TYPES)


def error_from_response(status: int, body: bytes) -> ShuteyeError:
    """The exception that an error answer stands for: by its `error.type`, else by its status."""
    error = error_object(body)
    fallback = _BY_STATUS.get(status, ClientError if status < 500 else ServerError)
    kind = _BY_TYPE.get(str(error.get("type")), fallback)
    text = body[:200].decode(errors="replace").strip() or "no message"
    message = error.get("message") or f"The server answered {status}: {text}"
    param = error.get("param")
    return kind(str(message), param=None if param is None else str(param).removeprefix("query."))


def error_object(body: bytes) -> Mapping[str, Any]:
    """The `error` object of OpenAI's shape, or an empty one if `body` has another shape."""
    try:
        error = json.loads(body)["error"]
    except (ValueError, LookupError, TypeError):
        return {}
    return error if isinstance(error, dict) else {}


def model_names(url: str, status: int, body: bytes) -> tuple[str, ...]:
    """The names in an answer of `GET /v1/models`, which came from `url`; never none.

    Raises:
        AuthenticationFailed: the key is wrong or missing; `param` is `api_key`.
        ShuteyeError: what else the server answered, or that it is none that serves models.
    """
    if status != 200:
        error = error_from_response(status, body)
        raise AuthenticationFailed(error.message, param="api_key") if status == 401 else error
    try:
        names = tuple(str(model["id"]) for model in json.loads(body)["data"])
    except (ValueError, LookupError, TypeError) as error:
        raise InternalError(f"{url} does not list models as OpenAI's does ({error!r}).") from error
    if not names:
        raise InternalError(f"{url} lists no model.")
    return names


def is_sleeping(status: int, body: bytes) -> bool:
    """True if the answer is the 503 of a sleeping model."""
    if status != ModelSleeping.status_code:
        return False
    error = error_object(body)  # Anthropic's shape has a type of its own, and the same message
    return error.get("type") == ModelSleeping.error_type or error.get("message") == ModelSleeping.MESSAGE
