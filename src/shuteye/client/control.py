"""The control routes of one server, as methods; what each control call takes is said in `shuteye.calls`."""

from __future__ import annotations

from collections.abc import AsyncIterable, Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, cast, get_origin

import httpx2
import msgspec

from shuteye.calls import (
    AsyncControls,
    Call,
    Controls,
    PauseCall,
    SleepCall,
    UnloadCall,
    WakeCall,
    report_of,
)
from shuteye.client.answers import error_from_response
from shuteye.client.leases import Lease, LeaseGrant, LeaseRequest, body_of
from shuteye.errors import InternalError, InvalidRequest, ModelNotFound, ServerUnreachable, SleepModeDisabled
from shuteye.model_info import ModelInfo
from shuteye.state import EngineState, SchedulerStats, UpdateReport
from shuteye.typed_fields import require_sendable

T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT_S = 300.0
"""Long, because `mode="wait"` drains requests and a first wake may read the weights from disk."""

UPLOAD = "application/octet-stream"


@dataclass(frozen=True, slots=True)
class WakingCost:
    """What a full wake would bring back, in bytes by tag, and how long the last one took, if there was one.

    `expected_s` is how long this one should take, at the last one's pace.
    """

    restore_bytes: int = 0
    tags: dict[str, int] = field(default_factory=dict)
    backings: dict[str, str | None] = field(default_factory=dict)
    last_wake_s: float | None = None
    expected_s: float | None = None


@dataclass(frozen=True, slots=True)
class ServerState:
    """The answer of GET /state.

    Attributes:
        status: `starting`, `ready`, `unloaded`, `hung`, `failed`, `dead` or `closed`.
        failure: why the engine failed, died or hangs, or None.
        models: the names that requests may use.
        ready: whether a request sent now would run now.
        model: None until it is loaded.
    """

    status: str
    failure: str | None
    models: tuple[str, ...]
    is_sleeping: bool
    is_paused: bool
    ready: bool
    state: EngineState
    waking: WakingCost
    model: ModelInfo | None
    stats: SchedulerStats


@contextmanager
def translated(base_url: str) -> Iterator[None]:
    """Turn httpx2's errors into ours, which name the server."""
    try:
        yield
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
        raise InvalidRequest(f"{base_url!r} is not an address like {DEFAULT_URL} ({error}).", param="url") from error
    except httpx2.TimeoutException as error:
        raise ServerUnreachable(f"The server at {base_url} did not answer in time ({error!r}).") from error
    except httpx2.TransportError as error:
        raise ServerUnreachable(f"Cannot reach {base_url} ({error}). Is the server running there?") from error


@dataclass(frozen=True, slots=True)
class Route(Generic[T]):
    """One request, and how to read its answer. Statuses in `accept` are answers, not errors."""

    method: str
    path: str
    parse: Callable[[int, bytes], T]
    doc: str = ""
    params: tuple[tuple[str, str], ...] = ()
    body: Mapping[str, object] | None = None
    content: Any = None  # bytes, or what yields them; instead of a body
    accept: frozenset[int] = frozenset()

    @property
    def payload(self) -> dict[str, Any]:
        """What httpx2 is to send."""
        if self.content is None:
            return {"params": self.params, "json": self.body}
        return {"params": self.params, "content": self.content, "headers": {"Content-Type": UPLOAD}}

    def result(self, base_url: str, response: httpx2.Response) -> T:
        """What the answer says.

        Raises:
            ShuteyeError: that the server answered with, or because what answered is no server of ours.
        """
        status, body = response.status_code, response.content
        if response.is_redirect:
            raise ServerUnreachable(
                f"{base_url}{self.path} redirects to {response.headers.get('location')!r}; control calls follow no "
                "redirect, for the admin key is meant for one server. If that is yours, give its address."
            )
        if response.is_success or status in self.accept:
            try:
                return self.parse(status, body)
            except (msgspec.MsgspecError, LookupError, TypeError) as error:
                raise InternalError(f"{base_url}{self.path} is not a shuteye server's answer ({error}).") from error
        failure = error_from_response(status, body)
        if isinstance(failure, ModelNotFound):  # no control route names a model: the route itself is missing
            mode = "" if self.path in {_RESTART_ENGINE.path, _SHUTDOWN.path} else "--enable-sleep-mode, and with "
            raise SleepModeDisabled(
                f"{base_url} has no route {self.path}. Start the server with {mode}--admin-api-key or in development "
                f"mode (SHUTEYE_SERVER_DEV_MODE=1)."
            )
        raise failure


# --- reading answers ----------------------------------------------------------------------------


def _as(kind: type[T]) -> Callable[[int, bytes], T]:
    """Reads JSON into a dataclass; fields of a newer server are ignored."""
    return lambda _status, body: msgspec.json.decode(body, type=kind)


def _report(kind: type[T]) -> Callable[[int, bytes], T]:
    """Reads the answer of /sleep or /wake_up, whose `tags` are the names that were asked for, as in vLLM's answers."""

    def parse(_status: int, body: bytes) -> T:
        answer = msgspec.json.decode(body)
        return msgspec.convert(answer | {"tags": answer["tag_reports"]}, type=kind)

    return parse


def _field(name: str, kind: type[T]) -> Callable[[int, bytes], T]:
    return lambda _status, body: msgspec.convert(msgspec.json.decode(body)[name], type=kind)


def _nothing(_status: int, _body: bytes) -> None:
    return None


def _says_stopping(_status: int, body: bytes) -> bool:
    return bool(msgspec.json.decode(body).get("reason") == "stopping")


def _is_ok(status: int, _body: bytes) -> bool:
    return status == 200


# --- the routes ---------------------------------------------------------------------------------

_IS_SLEEPING = Route("GET", "/is_sleeping", _field("is_sleeping", bool), "True until every tag is resident and loaded.")
_IS_PAUSED = Route("GET", "/is_paused", _field("is_paused", bool), "True while a pause is in force.")
_STATE = Route("GET", "/state", _as(ServerState), "All that the server knows of its engine, and what waking it takes.")
_HEALTH = Route(
    "GET",
    "/health",
    _is_ok,
    "True if the model is loaded and its engine is well, asleep or not.",
    accept=frozenset({500, 503}),
)
_READY = Route("GET", "/ready", _is_ok, "True if a request would be served now.", accept=frozenset({503}))
_VERSION = Route("GET", "/version", _field("version", str), "The server's version.")
_RESTART_ENGINE = Route(
    "POST",
    "/restart_engine",
    _field("seconds", float),
    "Start an engine again that is dead or hangs, and wait until it is loaded; how many seconds that took.",
)
_SHUTDOWN = Route(
    "POST",
    "/shutdown",
    _field("grace_s", float),
    "Stop the server as SIGTERM does; how many seconds what runs has to finish.",
)
_IS_STOPPING = Route(
    "GET",
    "/ready",
    _says_stopping,
    "True while the server finishes what runs before it ends.",
    accept=frozenset({503}),
)


def route_of(call: Call[T]) -> Route[T]:
    """How a control call is asked for over HTTP: what may be in a query goes there, as in vLLM's calls."""
    given = {name.removesuffix("_s"): getattr(call, name) for name in call.__struct_fields__}
    path, parse = f"/{call.verb}", _parser_of(type(call))
    if isinstance(call, SleepCall | WakeCall | UnloadCall | PauseCall):
        return Route("POST", path, parse, params=_params(given))
    return Route("POST", path, parse, body=given or None)


def _parser_of(kind: type[Call[T]]) -> Callable[[int, bytes], T]:
    report: Any = report_of(kind)
    if report is type(None):
        return cast(Callable[[int, bytes], T], _nothing)
    if get_origin(report) is list:
        return _field("results", report)
    return _report(report) if kind in {SleepCall, WakeCall, UnloadCall} else _as(report)


def _params(given: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    """Query parameters: None is left out, a sequence is repeated; an empty one is sent, for the server to refuse."""
    pairs: list[tuple[str, str]] = []
    for name, value in given.items():
        items = (value or [""]) if isinstance(value, tuple) else [value]
        pairs.extend((name, str(item)) for item in items if item is not None)
    return tuple(pairs)


def _upload(content: object) -> Route[UpdateReport]:
    return Route("POST", "/update_weights", _as(UpdateReport), content=content)


def _blocking(route: Route[T]) -> Callable[[Client], T]:
    """A method of `Client` that asks for a route."""

    def method(self: Client, /) -> T:
        return self.ask(route)

    method.__doc__ = route.doc
    return method


def _awaitable(route: Route[T]) -> Callable[[AsyncClient], Coroutine[Any, Any, T]]:
    """A method of `AsyncClient` that asks for a route."""

    async def method(self: AsyncClient, /) -> T:
        return await self.ask(route)

    method.__doc__ = route.doc
    return method


def bearer(key: str | None, *, name: str = "admin_api_key") -> dict[bytes, bytes]:
    """The header that carries `key`, in the bytes that the server compares; none without a key.

    Raises:
        InvalidRequest: no header can carry it; `param` is `name`, and the message does not show it.
    """
    if key is None:
        return {}
    require_sendable(name, key)
    return {b"Authorization": b"Bearer " + key.encode()}


def server_root(url: str) -> str:
    """`url` without the /v1 that OpenAI's clients want at its end."""
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


class Client(Controls):
    """The control routes of one server. Every method raises the `ShuteyeError` that the server answered with.

    Args:
        base_url: the server's root; a `/v1` at its end is left out.
        admin_api_key: as given to `shuteye serve --admin-api-key`.
        timeout_s: for each call.
        transport: instead of real connections, for tests.

    Raises:
        InvalidRequest: at construction, a key that no header can carry.
        ServerUnreachable: nothing answers there.
        SleepModeDisabled: the server does not offer control routes.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        admin_api_key: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self._base_url = server_root(base_url)
        self._http = httpx2.Client(
            headers=bearer(admin_api_key), timeout=timeout_s, transport=transport, follow_redirects=False
        )

    def ask(self, route: Route[T]) -> T:
        """What the server answers."""
        with translated(self._base_url):
            response = self._http.request(route.method, self._base_url + route.path, **route.payload)
        return route.result(self._base_url, response)

    def control(self, call: Call[T]) -> T:
        """Have the server carry out a control call."""
        return self.ask(route_of(call))

    update_weights = Controls.update_weights_from_file

    is_sleeping = _blocking(_IS_SLEEPING)
    is_paused = _blocking(_IS_PAUSED)
    state = _blocking(_STATE)
    health = _blocking(_HEALTH)
    ready = _blocking(_READY)
    version = _blocking(_VERSION)
    restart_engine = _blocking(_RESTART_ENGINE)
    shutdown = _blocking(_SHUTDOWN)
    is_stopping = _blocking(_IS_STOPPING)

    def upload_weights(self, content: bytes | Iterable[bytes]) -> UpdateReport:
        """Write the tensors of a safetensors file that is sent: its bytes, an open file, or what yields them."""
        return self.ask(_upload(content))

    def lease(self, nbytes: int, **more: Any) -> Lease:
        """Memory of the server's budget for somebody else, for as long as a `with` lasts; its models sleep for it.

        Args:
            more: the other fields of `LeaseRequest`: `within_s`, `ttl_s`, `holder`, `priority`, `may_sleep`, `restore`.
        """
        return Lease(
            LeaseRequest(nbytes, **more),
            claim=lambda request: self.ask(Route("POST", "/v1/leases", _as(LeaseGrant), body=body_of(request))),
            renew=lambda name, ttl_s: self.ask(Route("PUT", f"/v1/leases/{name}", _nothing, body={"ttl_s": ttl_s})),
            release=lambda name: self.ask(Route("DELETE", f"/v1/leases/{name}", _nothing)),
        )

    def close(self) -> None:
        """Close connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient(AsyncControls):
    """`Client`, awaitable."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        admin_api_key: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self._base_url = server_root(base_url)
        self._http = httpx2.AsyncClient(
            headers=bearer(admin_api_key), timeout=timeout_s, transport=transport, follow_redirects=False
        )

    async def ask(self, route: Route[T]) -> T:
        """What the server answers."""
        with translated(self._base_url):
            response = await self._http.request(route.method, self._base_url + route.path, **route.payload)
        return route.result(self._base_url, response)

    async def control(self, call: Call[T]) -> T:
        """Have the server carry out a control call."""
        return await self.ask(route_of(call))

    update_weights = AsyncControls.update_weights_from_file

    is_sleeping = _awaitable(_IS_SLEEPING)
    is_paused = _awaitable(_IS_PAUSED)
    state = _awaitable(_STATE)
    health = _awaitable(_HEALTH)
    ready = _awaitable(_READY)
    version = _awaitable(_VERSION)
    restart_engine = _awaitable(_RESTART_ENGINE)
    shutdown = _awaitable(_SHUTDOWN)
    is_stopping = _awaitable(_IS_STOPPING)

    async def upload_weights(self, content: bytes | AsyncIterable[bytes]) -> UpdateReport:
        """As `Client.upload_weights`."""
        return await self.ask(_upload(content))

    async def aclose(self) -> None:
        """Close connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()
