"""Fields of a body that no one here knows: left out, logged and named in the answer's header `X-Ignored-Fields`.

What would change the answer is known by name, and refused where a route does not do it. Why: ADR 28.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Iterable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

HEADER = b"x-ignored-fields"
MAX_NAMED = 16
"""Names in one header; of more, only these are told."""
MAX_LOGGED = 256
"""Names that are logged, each once, before no more are: callers choose them."""

_SHOWABLE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_IGNORED: ContextVar[set[str] | None] = ContextVar("ignored_fields", default=None)
"""Of the request that is being answered; None where unknown fields are refused."""


def ignore(names: Iterable[str]) -> bool:
    """Note that these fields are left out; False if they must not be, and are to be refused instead."""
    noted = _IGNORED.get()
    if noted is None:
        return False
    noted.update(names)
    return True


def renamed(names: Mapping[str, str]) -> None:
    """Tell fields that were left out by what the caller calls them, where a route stands on another one."""
    noted = _IGNORED.get() or set()
    for name in noted & names.keys():
        noted.remove(name)
        noted.add(names[name])


class IgnoredFields:
    """ASGI middleware: lets unknown fields of bodies be left out, and tells which ones were."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._logged: set[str] = set()

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Pass the request on."""
        if scope["type"] != "http":
            return self.app(scope, receive, send)
        noted: set[str] = set()
        _IGNORED.set(noted)  # for this task alone: each request has one

        def send_with_names(message: Message) -> Awaitable[None]:
            if noted and message["type"] == "http.response.start":
                shown = [name for name in sorted(noted) if _SHOWABLE.fullmatch(name)][:MAX_NAMED]
                names = ", ".join(shown) or "?"
                message["headers"] = [*message.get("headers", ()), (HEADER, names.encode())]
                self._log(shown, scope["path"])
            return send(message)

        return self.app(scope, receive, send_with_names)

    def _log(self, names: Iterable[str], path: str) -> None:
        new = [name for name in names if name not in self._logged]
        if new and len(self._logged) < MAX_LOGGED:
            self._logged.update(new)
            logger.warning("%s: unknown fields were ignored: %s (said once for each).", path, ", ".join(new))
