"""Flags and helpers shared by the commands that talk to a running server.

Knows nothing of what they ask it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import Parameter, Token

from shuteye.cli.values import TIMEOUT_VARIABLE, URL_VARIABLE
from shuteye.client import DEFAULT_TIMEOUT_S, DEFAULT_URL, AsyncClient, Client
from shuteye.state import TAGS

AsJson = Annotated[bool, Parameter(name="--json", negative="", help="Print everything as JSON.")]


def tags_parameter(does: str) -> Parameter:
    """A flag that takes names of tags, repeated or separated by commas."""
    names = f"{', '.join(TAGS[:-1])} or {TAGS[-1]}"
    return Parameter(
        help=f"{does}: {names}; several may be separated by commas.",
        converter=_tags,
        consume_multiple=True,
        negative="",
        metavar="TAG",
    )


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
