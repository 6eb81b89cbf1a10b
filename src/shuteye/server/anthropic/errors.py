"""Errors in Anthropic's shape: its types by status, the message as it is everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec
from msgspec import Struct

from shuteye.errors import ShuteyeError
from shuteye.server.http.errors import error_body
from shuteye.server.http.middleware import current_request_id

PREFIX = "/v1/messages"
"""Errors of this path, and of what is below it, have this shape."""

_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class MessageErrorDetail(Struct, kw_only=True):
    """What went wrong."""

    type: str
    message: str


class MessageError(Struct, kw_only=True):
    """Every error of the Messages API; as an event, too."""

    type: Literal["error"] = "error"
    error: MessageErrorDetail
    request_id: str


def anthropic_error(status: int, body: Mapping[str, Any]) -> Mapping[str, Any]:
    """What an error in OpenAI's shape is in Anthropic's."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    detail = MessageErrorDetail(type=kind, message=body["error"]["message"])
    found: Mapping[str, Any] = msgspec.to_builtins(MessageError(error=detail, request_id=current_request_id()))
    return found


def error_event(error: ShuteyeError) -> Mapping[str, Any]:
    """The data of the event that ends a stream in the middle."""
    return anthropic_error(error.status_code, error_body(error))
