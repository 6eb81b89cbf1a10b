"""Turns every error, ours or the framework's, expected or not, into OpenAI's shape or that of its route."""

from __future__ import annotations

import json
import logging
import math
import reprlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from msgspec import UNSET, UnsetType
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from shuteye.errors import (
    AuthenticationFailed,
    EngineDead,
    EngineHung,
    EngineNotReady,
    InternalError,
    InvalidRequest,
    MemoryExhausted,
    ModelPaused,
    ModelSleeping,
    PromptTooLong,
    QueueFull,
    RequestAborted,
    ServerStopping,
    ShuteyeError,
    WakeFailed,
)
from shuteye.logs import REQUEST_ID
from shuteye.server.http.answers import ErrorAnswer, ErrorDetail

_access = logging.getLogger("uvicorn.access")

RETRY_AFTER_S: Mapping[type[ShuteyeError], int] = {
    ModelSleeping: 1,
    ModelPaused: 1,
    RequestAborted: 1,
    QueueFull: 1,
    WakeFailed: 2,
    MemoryExhausted: 5,
    EngineNotReady: 5,
    EngineDead: 5,
    EngineHung: 5,
    ServerStopping: 5,
}
"""Errors worth a retry, and after how many seconds; subclasses inherit."""

_HTTP_ERROR_TYPES = {
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    431: "HeadersTooLargeError",
}


CONTEXT_LENGTH = "context_length_exceeded"
"""OpenAI's code of a prompt that does not fit, by which clients choose another model; other codes are the status."""


ErrorShape = Callable[[int, Mapping[str, Any]], Mapping[str, Any]]
"""Makes of a status, and of an error in OpenAI's shape, what callers of some routes expect instead."""

ErrorShapes = Mapping[str, ErrorShape]
"""By paths whose errors, and those of what is below them, are not in OpenAI's shape."""

Handler = Callable[[Request, Exception], Awaitable[Response]]


class ClientDisconnected(Exception):
    """The client disconnected; the work has been cancelled."""


def error_body(error: ShuteyeError) -> dict[str, Any]:
    """OpenAI's error shape; `ModelSleeping` has exactly the three keys and the message of the contract."""
    if isinstance(error, ModelSleeping):
        return _body(error.MESSAGE, error.error_type, UNSET, error.status_code)
    code = CONTEXT_LENGTH if isinstance(error, PromptTooLong) else error.status_code
    return _body(error.message, error.error_type, error.param, code)


def _body(message: str, kind: str, param: str | UnsetType | None, code: int | str) -> dict[str, Any]:
    body: dict[str, Any] = msgspec.to_builtins(
        ErrorAnswer(ErrorDetail(message=message, type=kind, param=param, code=code))
    )
    return body


def error_json(error: ShuteyeError) -> bytes:
    """`error_body` as JSON on one line, for a response or an event of a stream."""
    return json.dumps(error_body(error)).encode()


def error_response(error: ShuteyeError) -> Response:
    """The whole answer: status, body, and the headers that go with them."""
    return _json_response(error.status_code, error_body(error), error_headers(error))


def error_headers(error: ShuteyeError) -> dict[str, str]:
    """The headers that go with an error's answer."""
    if isinstance(error, AuthenticationFailed):
        return {"WWW-Authenticate": "Bearer"}
    for kind, seconds in RETRY_AFTER_S.items():
        if isinstance(error, kind):
            return {"Retry-After": str(seconds)}
    return {}


def _json_response(status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps(body), status, headers=headers, media_type="application/json")


# --- validation ---------------------------------------------------------------------------------


def invalid_request(errors: Sequence[Mapping[str, Any]]) -> InvalidRequest:
    """A validator's first error, as one that names the field as the caller knows it."""
    first = errors[0]
    param = _param(first["loc"])
    return InvalidRequest(_message(first, param), param=param)


def _param(location: Sequence[str | int]) -> str | None:
    path = ""
    for part in location[1:]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path or None


def _message(error: Mapping[str, Any], param: str | None) -> str:
    kind = error["type"]
    if kind == "json_invalid":
        position = error["loc"][-1]
        where = f" at character {position}" if isinstance(position, int) else ""  # else the message says where
        return f"The body is not valid JSON: {error['ctx']['error']}{where}."
    if kind == "extra_forbidden":
        return f"Unknown field '{param}'. Check its spelling, or remove it."
    if kind == "missing" and param is None:
        return "The request has no body; send a JSON object with Content-Type: application/json."
    if kind == "missing":
        return f"Field '{param}' is required."
    if param is None:
        return "The body must be a JSON object, sent with Content-Type: application/json."
    return f"{param}: {error['msg']}, got {_shortened(error.get('input'))}."


def _shortened(value: object, limit: int = 80) -> str:
    text = repr(value[:limit]) if isinstance(value, bytes) else _SHORT.repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 4
_SHORT.maxlist = _SHORT.maxdict = _SHORT.maxtuple = 40
_SHORT.maxstring = _SHORT.maxother = 120
"""Looks no further into a value than is shown."""


QUERY = "query."
"""Stands before the name of a parameter that was in the query, as in vLLM; a body's fields have their bare names."""

# --- handlers -----------------------------------------------------------------------------------


async def _on_shuteye_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ShuteyeError)
    if error.param is not None and error.param in request.query_params:
        error.param = f"{QUERY}{error.param}"
    headers = error_headers(error)
    if isinstance(error, ModelSleeping):
        headers["Retry-After"] = str(_wake_takes_s(request, at_least=int(headers["Retry-After"])))
    return _json_response(error.status_code, error_body(error), headers)


def _wake_takes_s(request: Request, *, at_least: int) -> int:
    """Whole seconds that waking should take, at the pace of the last wake; `at_least` if there was none."""
    from shuteye.server.context import context_of  # which needs this module

    context = context_of(request)
    expected = context.metrics.next_wake_s(context.engine.state)
    return at_least if expected is None else max(at_least, math.ceil(expected))


async def _on_validation_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return error_response(InvalidRequest(_message(first, None)))
    refusal = invalid_request(error.errors())
    if refusal.param is not None and first["loc"][0] == "query":
        refusal.param = f"{QUERY}{refusal.param}"
    return error_response(refusal)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return http_error(error.status_code, _http_message(request, error), error.headers)


def http_error(code: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """An error of HTTP itself, which no class of ours stands for, in OpenAI's shape."""
    kind = _HTTP_ERROR_TYPES.get(code, "BadRequestError" if code < 500 else "InternalServerError")
    return _json_response(code, _body(message, kind, None, code), headers)


def _http_message(request: Request, error: HTTPException) -> str:
    if error.status_code == 404:
        return f"No route {request.method} {request.url.path}."
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        return f"{request.url.path} does not answer {request.method}; it answers {allowed}."
    return str(error.detail)


async def _on_disconnect(request: Request, _error: Exception) -> Response:
    """Nginx's status for a client that went; uvicorn, which has nobody to send it to, does not log it."""
    scope, client = request.scope, request.client
    path = scope["path"] + (f"?{scope['query_string'].decode('latin-1')}" if scope["query_string"] else "")
    where = f"{client.host}:{client.port}" if client else ""
    _access.info('%s - "%s %s HTTP/%s" %d', where, request.method, quote(path, "/?&=%"), scope["http_version"], 499)
    return Response(status_code=499)


async def _on_unexpected(_request: Request, _error: Exception) -> Response:
    # starlette raises the error again after this answer, and uvicorn logs its traceback; no middleware sees the answer
    answer = error_response(InternalError("Internal server error: a bug of ours; the server's log has the traceback."))
    answer.headers["X-Request-Id"] = REQUEST_ID.get() or "unknown"
    return answer


_HANDLERS: Mapping[type[Exception], Handler] = {
    ShuteyeError: _on_shuteye_error,
    RequestValidationError: _on_validation_error,
    HTTPException: _on_http_error,
    ClientDisconnected: _on_disconnect,
    ClientDisconnect: _on_disconnect,  # starlette's, where a route reads its body
    Exception: _on_unexpected,
}


def install_error_handlers(app: FastAPI, shapes: ErrorShapes) -> None:
    """Make `app` answer every error in OpenAI's shape, or in that of its path."""
    for kind, handler in _HANDLERS.items():
        app.add_exception_handler(kind, _shaping(handler, shapes))


def _shaping(handler: Handler, shapes: ErrorShapes) -> Handler:
    async def handle(request: Request, error: Exception) -> Response:
        return in_shape(await handler(request, error), request.url.path, shapes)

    return handle


def in_shape(answer: Response, path: str, shapes: ErrorShapes) -> Response:
    """An error in OpenAI's shape, in that of the path that it answers."""
    shape = next((shape for prefix, shape in shapes.items() if f"{prefix}/" in f"{path}/"), None)
    if shape is not None and answer.body:
        answer.body = json.dumps(shape(answer.status_code, json.loads(bytes(answer.body)))).encode()
        answer.headers["Content-Length"] = str(len(answer.body))
    return answer
