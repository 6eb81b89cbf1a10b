"""JSON answers: how Structs become responses, and the shape of every error.

A field with a default is always written; one that is `UNSET` is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import Response
from msgspec import UNSET, Struct, UnsetType

encode_json = msgspec.json.Encoder().encode


class JsonAnswer(Response):
    """A Struct, or a report, as the body of a response."""

    media_type = "application/json"

    def __init__(self, answer: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(encode_json(answer), status, headers)


class ErrorDetail(Struct, kw_only=True):
    """What went wrong; the error of a sleeping model has no `param`. `code` is the status, or a name of OpenAI's."""

    message: str
    type: str
    param: str | UnsetType | None = UNSET
    code: int | str


class ErrorAnswer(Struct):
    """Every error (OpenAI's shape)."""

    error: ErrorDetail
