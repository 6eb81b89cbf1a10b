"""Reads control calls out of requests: their fields may be in the query, or in a JSON body in its place.

Knows nothing of what the calls do; what a call takes is said once, in `shuteye.calls`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine, Sequence
from typing import Annotated, Any, TypeVar, cast, get_type_hints

import msgspec
from fastapi import Depends, Query, Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

from shuteye.calls import Call, notes_of
from shuteye.errors import InvalidRequest
from shuteye.server.context import context_of
from shuteye.server.http.bodies import parsed
from shuteye.server.http.errors import invalid_request

C = TypeVar("C", bound=Call[Any])

STRICT = ConfigDict(extra="forbid")


class NoParameters(BaseModel):
    """A query without parameters."""

    model_config = STRICT


def _nothing(_query: Annotated[NoParameters, Query()]) -> None:
    """FastAPI has refused what the query should not have."""


NO_QUERY = Depends(_nothing)
"""For routes that take nothing."""


def media_type(request: Request) -> str:
    """The Content-Type without its parameters, in lower case; empty if there is none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


# --- a call's fields as HTTP has them -----------------------------------------------------------


@functools.cache
def model_of(kind: type[Call[Any]]) -> type[BaseModel]:
    """The fields of a call as pydantic validates them; `timeout_s` is called `timeout`, and must be above 0."""
    hints, notes = get_type_hints(kind), notes_of(kind)
    fields = {
        field.name.removesuffix("_s"): (_annotation(hints[field.name]), _field(field, notes.get(field.name)))
        for field in msgspec.structs.fields(kind)
    }
    return cast(
        type[BaseModel],
        create_model(
            kind.__name__,
            __config__=STRICT,
            __doc__=inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0],
            **cast(Any, fields),
        ),
    )


def _split(texts: Any) -> Any:
    """`a,b` is two, as in `tags=a&tags=b`."""
    if not isinstance(texts, list):
        return texts
    parts = [text.split(",") if isinstance(text, str) else [text] for text in texts]
    return [part.strip() if isinstance(part, str) else part for split in parts for part in split if part != ""]


def _annotation(hint: Any) -> Any:
    if hint == Sequence[str] | None:
        return Annotated[list[str] | None, BeforeValidator(_split)]
    return list[Any] if hint == Sequence[Any] else hint


def _field(field: msgspec.structs.FieldInfo, note: msgspec.Meta | None) -> Any:
    options: dict[str, Any] = {"gt": 0, "allow_inf_nan": False} if field.name.endswith("_s") else {}
    if note is not None:
        options |= {"description": note.description, "min_length": note.min_length}
    if field.default_factory is not msgspec.NODEFAULT:
        options["default_factory"] = field.default_factory
    elif field.default is not msgspec.NODEFAULT:
        options["default"] = list(field.default) if isinstance(field.default, tuple) else field.default
    return Field(**options)


def call_of(kind: type[C], fields: BaseModel) -> C:
    """The call that validated fields ask for."""
    given = fields.model_dump(exclude_unset=True)
    return kind(**{name if name in kind.__struct_fields__ else f"{name}_s": value for name, value in given.items()})


# --- reading ------------------------------------------------------------------------------------


def requested(kind: type[C], *, in_query: bool = True) -> Any:
    """A route's parameter: the call that a request asks for.

    Raises:
        HTTPException: 413, the body is too long.
        InvalidRequest: a field is unknown, of another type, twice in the query, or other in the body than in the query.
    """
    fields = model_of(kind)

    async def read(query: BaseModel, request: Request) -> C:
        _refuse_repeated(query, request)
        body = await _body_of(request, fields)
        if not in_query:
            return call_of(kind, _validated(fields, {}) if body is None else body)
        return call_of(kind, query if body is None else _merged(query, body))

    read.__annotations__["query"] = Annotated[fields if in_query else NoParameters, Query()]
    return Depends(cast(Callable[..., Coroutine[Any, Any, C]], read))


def read_json(model: type[BaseModel], content: bytes, *, max_bytes: int) -> BaseModel:
    """`content` as a `model`; values must have its types.

    Raises:
        HTTPException: 413, it is longer than `max_bytes`.
        InvalidRequest: it is none; `param` names the field.
    """
    return _validated(model, parsed(content, max_bytes=max_bytes))


def _validated(model: type[BaseModel], found: object) -> BaseModel:
    try:
        return model.model_validate(found, strict=True)
    except ValidationError as error:
        raise invalid_request([one | {"loc": ("body", *one["loc"])} for one in error.errors()]) from error


async def _body_of(request: Request, model: type[BaseModel]) -> BaseModel | None:
    """What the body says; None if it is empty."""
    content = await request.body()
    if not content:
        return None
    kind = media_type(request)
    if kind != "application/json":
        raise InvalidRequest(
            f"The body must be a JSON object with Content-Type: application/json, got Content-Type: {kind or 'none'}. "
            "Parameters may also be sent in the query, without a body."
        )
    return read_json(model, content, max_bytes=context_of(request).config.max_json_bytes)


def _merged(query: BaseModel, body: BaseModel) -> BaseModel:
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


def documented_body(kind: type[Call[Any]], **other: Any) -> dict[str, Any]:
    """What OpenAPI is to say of a body that a call may come in, and of the bodies that it may have instead."""
    schema = model_of(kind).model_json_schema()
    required = {"required": True} if schema.get("required") else {}
    return {"requestBody": {**required, "content": {"application/json": {"schema": schema}, **other}}}
