"""Flags and helpers shared by the commands that talk to a running server."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Concatenate, Literal, ParamSpec, TypeVar, get_type_hints

import msgspec
from cyclopts import Parameter, Token

from shuteye.calls import Call, notes_of
from shuteye.cli.values import INTEGER, TIMEOUT_VARIABLE, URL_VARIABLE
from shuteye.client import DEFAULT_TIMEOUT_S, DEFAULT_URL, AsyncClient, Client
from shuteye.state import TAGS

C = TypeVar("C", bound=Call[Any])
P = ParamSpec("P")

AsJson = Annotated[bool, Parameter(name="--json", negative="", help="Print everything as JSON.")]


def takes(kind: type[C], *names: str) -> Callable[[Callable[Concatenate[C, P], None]], Callable[P, None]]:
    """A command that is given the control call which its flags ask for: these fields of it, then the command's own."""

    def decorated(command: Callable[Concatenate[C, P], None]) -> Callable[P, None]:
        @functools.wraps(command)
        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            fields: dict[str, Any] = {name: kwargs.pop(name) for name in names if name in kwargs}
            command(kind(**fields), *args, **kwargs)

        _, *own = inspect.signature(command, eval_str=True).parameters.values()
        run.__signature__ = inspect.Signature([*_flags_of(kind, names), *own])  # type: ignore[attr-defined]
        return run

    return decorated


def _flags_of(kind: type[Call[Any]], names: Sequence[str]) -> Iterator[inspect.Parameter]:
    hints, notes = get_type_hints(kind), notes_of(kind)
    defaults = {field.name: field.default for field in msgspec.structs.fields(kind)}
    for name in names:
        annotation = _annotation(hints[name], notes[name])
        yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=annotation)


def _annotation(hint: Any, note: msgspec.Meta) -> Any:
    if hint == Sequence[str] | None:
        text = f"{note.description} Several may be separated by commas."
        flag = Parameter(help=text, converter=_tags, consume_multiple=True, negative="", metavar="TAG")
        return Annotated[tuple[str, ...] | None, flag]
    chosen: Any = Literal[(note.extra or {})["choices"]]
    if hint is int:
        return Annotated[chosen, INTEGER, Parameter(help=note.description)]
    return Annotated[chosen | None, Parameter(help=note.description)]


def _tags(_type: Any, tokens: Sequence[Token]) -> tuple[str, ...]:
    tags = tuple(tag.strip() for token in tokens for tag in token.value.split(",") if tag.strip())
    unknown = [tag for tag in tags if tag not in TAGS]
    if unknown or not tags:
        raise ValueError(f"{unknown[0] if unknown else ''!r} is not a tag; there are {' and '.join(TAGS)}.")
    return tags


def _seconds(_type: Any, seconds: float) -> None:
    if not (seconds > 0 and math.isfinite(seconds)):
        raise ValueError(f"Must be a number of seconds above 0, got {seconds:g}.")


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class Remote:
    """A running server."""

    url: Annotated[
        str, Parameter(help="The server's address, such as http://127.0.0.1:8000.", env_var=URL_VARIABLE)
    ] = DEFAULT_URL
    admin_api_key: Annotated[
        str | None,
        Parameter(help="As given to `shuteye serve --admin-api-key`.", env_var="SHUTEYE_ADMIN_API_KEY"),
    ] = None
    timeout_s: Annotated[
        float,
        Parameter(help="How long to wait for the answer, in seconds.", env_var=TIMEOUT_VARIABLE, validator=_seconds),
    ] = DEFAULT_TIMEOUT_S

    def connect(self) -> Client:
        """A client for it; close it after use."""
        return Client(self.url, admin_api_key=self.admin_api_key, timeout_s=self.timeout_s)

    def connect_async(self) -> AsyncClient:
        """The same for asyncio."""
        return AsyncClient(self.url, admin_api_key=self.admin_api_key, timeout_s=self.timeout_s)
