"""Which of the served models a request is for: by `model` in its query, else in its JSON body or its form.

Where one model is served its routes look at the body's name by themselves; a body is read here only where there is a
choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, urlencode

from fastapi import Request
from starlette.requests import ClientDisconnect

from shuteye.errors import InvalidRequest
from shuteye.server.context import CHOSEN, contexts_of
from shuteye.server.http.errors import ClientDisconnected

PARAMETER = "model"
FORM_LIMITS = {"max_files": 1, "max_fields": 100}
"""Of what is sent with audio."""


async def choose_model(request: Request) -> None:
    """Note in the request's scope which model it is for, where it names one. Its query has that name no longer.

    Raises:
        ModelNotFound: no such name is served.
        InvalidRequest: it names two, or something that is no name.
    """
    contexts = contexts_of(request.app)
    name = _taken_from_query(request)
    if contexts.are_several and name is None:
        name = await _name_in_body(request)
    if name is not None:
        request.scope[CHOSEN] = contexts.named(name)


def _taken_from_query(request: Request) -> str | None:
    query = request.scope["query_string"].decode("latin-1")
    if PARAMETER not in query:
        return None
    pairs = parse_qsl(query, keep_blank_values=True)
    names: list[str] = [value for key, value in pairs if key == PARAMETER]
    if not names:
        return None
    if len(set(names)) > 1:
        raise InvalidRequest(f"The query names {len(names)} models; name one.", param=PARAMETER)
    request.scope["query_string"] = urlencode([pair for pair in pairs if pair[0] != PARAMETER]).encode("latin-1")
    return names[0]


async def _name_in_body(request: Request) -> str | None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if kind == "multipart/form-data":
            found: Any = await request.form(**FORM_LIMITS)
        elif request.method == "POST" and kind in ("application/json", "") and await request.body():
            found = await request.json()
        else:
            return None
    except ClientDisconnect:
        raise ClientDisconnected from None
    name: object = found.get(PARAMETER) if isinstance(found, Mapping) else None
    if name is None or isinstance(name, str):
        return name
    raise InvalidRequest(f"model must be a text, got {type(name).__name__}.", param=PARAMETER)
