"""Decides which key opens which route, before the body is read."""

from __future__ import annotations

import hmac
import re
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar
from urllib.parse import urlsplit

from fastapi import Request, Response
from fastapi.routing import APIRoute

from shuteye.errors import AuthenticationFailed, PermissionRefused
from shuteye.server.config import ServerConfig
from shuteye.server.context import context_of
from shuteye.server.http.bodies import JsonRequest
from shuteye.server.http.model_choice import choose_model

Handler = Callable[[Request], Coroutine[Any, Any, Response]]

_HOST = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<name>[^\s:/@\[\]]+))(?::\d+)?")  # RFC 9110, 7.2


class InferenceRoute(APIRoute):
    """Opened by the API key or the admin key; open to all if no API key is configured.

    Attributes:
        key_header: a header that may carry the key as well as `Authorization: Bearer`; None if none may.
    """

    key_header: ClassVar[str | None] = None

    def get_route_handler(self) -> Handler:
        """The route's handler, behind the check."""
        return behind_inference_key(super().get_route_handler(), key_header=self.key_header)


class ControlRoute(APIRoute):
    """Opened by the admin key alone; in development mode without one, by any caller that is not a web page."""

    def get_route_handler(self) -> Handler:
        """The route's handler, behind the check."""
        handle = super().get_route_handler()

        async def checked(request: Request) -> Response:
            config = context_of(request).config
            _require_admin_key(request, config)
            bounded = _with_json(request, config)
            await choose_model(bounded)
            return await handle(bounded)

        return checked


def behind_inference_key(handle: Handler, *, key_header: str | None = None) -> Handler:
    """`handle`, called only for requests that carry a key that opens inference routes."""

    async def checked(request: Request) -> Response:
        config = context_of(request).config
        _require_inference_key(request, config, key_header)
        bounded = _with_json(request, config)
        try:
            await choose_model(bounded)
            return await handle(bounded)
        finally:
            await bounded.close()  # a form that was read to find the model, and whose route has refused it

    return checked


def _with_json(request: Request, config: ServerConfig) -> JsonRequest:
    return JsonRequest(request.scope, request.receive, max_bytes=config.max_json_bytes)


def _require_inference_key(request: Request, config: ServerConfig, key_header: str | None) -> None:
    if config.api_key is None:
        return
    given = _bearer_token(request)
    if given is None and key_header is not None:
        given = request.headers.get(key_header)
    if not (_same(given, config.api_key) | _same(given, config.admin_api_key)):
        raise _unauthenticated(given, "API key", key_header)


def _require_admin_key(request: Request, config: ServerConfig) -> None:
    if config.admin_api_key is None:
        assert config.dev_mode, "control routes are registered only with an admin key or in development mode"
        _require_trusted_host(request, config)
        _require_same_origin(request)
        return
    given = _bearer_token(request)
    if _same(given, config.admin_api_key):
        return
    if _same(given, config.api_key):
        raise PermissionRefused("This key is for inference; control routes need the admin key (--admin-api-key).")
    raise _unauthenticated(given, "admin key")


def _require_trusted_host(request: Request, config: ServerConfig) -> None:
    # DNS rebinding: a page's own name, resolved to this machine after the page was loaded, makes it and this server the
    # same origin to a browser; only the name in `Host` still tells
    host = request.headers.get("host")
    name = _host_name(host)
    if name is not None and config.may_be_called(name):
        return
    raise PermissionRefused(
        f"Control routes without an admin key must be called by a name that no web page can take, such as localhost or "
        f"127.0.0.1, and this request was for host {host!r}. Call the server by such a name, list this one in "
        "--allowed-hosts, or use --admin-api-key."
    )


def _host_name(host: str | None) -> str | None:
    """The name or address in a `Host` header, in lower case and without port; None if there is none to be read."""
    match = _HOST.fullmatch(host or "")
    return None if match is None else (match["v6"] or match["name"]).lower()


def _require_same_origin(request: Request) -> None:
    # without a key, any web page open in a browser on this machine could otherwise put the model to sleep
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise PermissionRefused(f"Control routes without an admin key refuse web pages of another origin ({origin}).")


def _bearer_token(request: Request) -> str | None:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else None


def _same(given: str | None, key: str | None) -> bool:
    if given is None or key is None:
        return False
    return hmac.compare_digest(given.encode("latin-1"), key.encode())  # headers arrive decoded as latin-1


def _unauthenticated(given: str | None, what: str, key_header: str | None = None) -> AuthenticationFailed:
    seen = "none was given" if given is None else "the one given is wrong"
    other = "" if key_header is None else f" or {key_header}: <key>"
    return AuthenticationFailed(f"This route needs the {what}, and {seen}; send Authorization: Bearer <key>{other}.")
