"""Reads JSON bodies of control calls, which may say the same as the query.

Knows nothing of what the calls do.
"""

from __future__ import annotations

from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from shuteye.errors import InvalidRequest
from shuteye.server.context import context_of
from shuteye.server.http.bodies import parsed
from shuteye.server.http.errors import invalid_request

Model = TypeVar("Model", bound=BaseModel)


def media_type(request: Request) -> str:
    """The Content-Type without its parameters, in lower case; empty if there is none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def read_json(model: type[Model], content: bytes, *, max_bytes: int) -> Model:
    """`content` as a `model`; values must have its types.

    Raises:
        HTTPException: 413, it is longer than `max_bytes`.
        InvalidRequest: it is none; `param` names the field.
    """
    found = parsed(content, max_bytes=max_bytes)
    try:
        return model.model_validate(found, strict=True)
    except ValidationError as error:
        raise invalid_request([one | {"loc": ("body", *one["loc"])} for one in error.errors()]) from error


async def with_body(query: Model, request: Request) -> Model:
    """`query`, and what the JSON body says in its place; no body, or an empty one, says nothing.

    Raises:
        InvalidRequest: the query has a name twice, though not for a list; the body is no JSON object of these fields,
            or contradicts the query.
    """
    _refuse_repeated(query, request)
    content = await request.body()
    if not content:
        return query
    kind = media_type(request)
    if kind != "application/json":
        raise InvalidRequest(
            f"The body must be a JSON object with Content-Type: application/json, got Content-Type: {kind or 'none'}. "
            "Parameters may also be sent in the query, without a body."
        )
    body = read_json(type(query), content, max_bytes=context_of(request).config.max_json_bytes)
    for name in sorted(query.model_fields_set & body.model_fields_set):
        in_query, in_body = getattr(query, name), getattr(body, name)
        if in_query != in_body:
            raise InvalidRequest(
                f"{name} is {in_query!r} in the query and {in_body!r} in the body; send one of them.", param=name
            )
    return query.model_copy(update={name: getattr(body, name) for name in body.model_fields_set})


def _refuse_repeated(query: BaseModel, request: Request) -> None:
    """Of a name that comes twice, the query has the last value alone, unless it is a list."""
    names = [name for name, _ in request.query_params.multi_items()]
    for name in query.model_fields_set:
        if names.count(name) > 1 and not isinstance(getattr(query, name), list):
            raise InvalidRequest(f"{name} is given {names.count(name)} times in the query; send it once.", param=name)


def documented_body(model: type[BaseModel]) -> dict[str, Any]:
    """What OpenAPI is to say of a body that may take the query's place."""
    return {"requestBody": {"content": {"application/json": {"schema": model.model_json_schema()}}}}
