"""Flags and helpers shared by the commands that talk to a running server.

Knows nothing of what they ask it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter

from shuteye.cli.flags import TIMEOUT_VARIABLE, URL_VARIABLE
from shuteye.client import DEFAULT_TIMEOUT_S, DEFAULT_URL, AsyncClient, Client

TagName = Literal["weights", "kv_cache"]

AsJson = Annotated[bool, Parameter(name="--json", negative="", help="Print everything as JSON.")]


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class Remote:
    """A running server."""

    url: Annotated[str, Parameter(help="The server's address, without /v1.", env_var=URL_VARIABLE)] = DEFAULT_URL
    admin_api_key: Annotated[
        str | None,
        Parameter(help="As given to `shuteye serve --admin-api-key`.", env_var="SHUTEYE_ADMIN_API_KEY"),
    ] = None
    timeout_s: Annotated[
        float, Parameter(help="How long to wait for the answer, in seconds.", env_var=TIMEOUT_VARIABLE)
    ] = DEFAULT_TIMEOUT_S

    def connect(self) -> Client:
        """A client for it; close it after use."""
        return Client(self.url, admin_api_key=self.admin_api_key, timeout_s=self.timeout_s)

    def connect_async(self) -> AsyncClient:
        """The same for asyncio."""
        return AsyncClient(self.url, admin_api_key=self.admin_api_key, timeout_s=self.timeout_s)
