"""The control routes of one server, as methods.

Knows nothing of engines, nor of requests to the model.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import httpx2
import msgspec

from shuteye.client.answers import error_from_response
from shuteye.errors import InternalError, InvalidRequest, ModelNotFound, ServerUnreachable, SleepModeDisabled
from shuteye.model_info import ModelInfo
from shuteye.state import EngineState, SchedulerStats, SleepReport, UpdateReport, WakeReport
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
        status: `starting`, `ready`, `hung`, `failed`, `dead` or `closed`.
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
class _Call(Generic[T]):
    """One control route: what to send, and how to read the answer. Statuses in `accept` are answers, not errors."""

    method: str
    path: str
    parse: Callable[[int, bytes], T]
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
            mode = "" if self.path == _RESTART_ENGINE.path else "--enable-sleep-mode, and with "
            raise SleepModeDisabled(
                f"{base_url} has no route {self.path}. Start the server with {mode}--admin-api-key or in development "
                f"mode (SHUTEYE_SERVER_DEV_MODE=1)."
            )
        raise failure


def _params(**values: object) -> tuple[tuple[str, str], ...]:
    """Query parameters: None is left out, a sequence is repeated."""
    pairs: list[tuple[str, str]] = []
    for name, value in values.items():
        items = value if isinstance(value, list | tuple) else [value]
        pairs.extend((name, str(item)) for item in items if item is not None)
    return tuple(pairs)


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


def _is_ok(status: int, _body: bytes) -> bool:
    return status == 200


def _sleep(
    level: int, mode: str | None, tags: Sequence[str] | None, drain_timeout_s: float | None
) -> _Call[SleepReport]:
    params = _params(level=level, mode=mode, tags=_listed(tags), timeout=drain_timeout_s)
    return _Call("POST", "/sleep", _report(SleepReport), params)


def _wake_up(tags: Sequence[str] | None) -> _Call[WakeReport]:
    return _Call("POST", "/wake_up", _report(WakeReport), _params(tags=_listed(tags)))


def _pause(mode: str | None, drain_timeout_s: float | None) -> _Call[None]:
    return _Call("POST", "/pause", _nothing, _params(mode=mode, timeout=drain_timeout_s))


def _reload_weights(path: str | None) -> _Call[UpdateReport]:
    return _Call("POST", "/reload_weights", _as(UpdateReport), body={"path": path})


def _update_weights(path: str) -> _Call[UpdateReport]:
    return _Call("POST", "/update_weights", _as(UpdateReport), body={"path": path})


def _upload_weights(content: object) -> _Call[UpdateReport]:
    return _Call("POST", "/update_weights", _as(UpdateReport), content=content)


def _collective_rpc(method: str, args: Sequence[object]) -> _Call[list[Any]]:
    body = {"method": method, "args": list(args)}
    return _Call("POST", "/collective_rpc", _field("results", list[Any]), body=body)


def _listed(tags: Sequence[str] | None) -> list[str] | None:
    """`tags` as a list; an empty one becomes an empty value, which the server refuses as it refuses `tags=[]`."""
    return None if tags is None else [*tags] or [""]


_RESUME = _Call("POST", "/resume", _nothing)
_RESTART_ENGINE = _Call("POST", "/restart_engine", _field("seconds", float))
_RESET_PREFIX_CACHE = _Call("POST", "/reset_prefix_cache", _nothing)
_IS_SLEEPING = _Call("GET", "/is_sleeping", _field("is_sleeping", bool))
_IS_PAUSED = _Call("GET", "/is_paused", _field("is_paused", bool))
_STATE = _Call("GET", "/state", _as(ServerState))
_HEALTH = _Call("GET", "/health", _is_ok, accept=frozenset({500, 503}))
_READY = _Call("GET", "/ready", _is_ok, accept=frozenset({503}))
_VERSION = _Call("GET", "/version", _field("version", str))


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


class Client:
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

    def _run(self, call: _Call[T]) -> T:
        with translated(self._base_url):
            response = self._http.request(call.method, self._base_url + call.path, **call.payload)
        return call.result(self._base_url, response)

    def sleep(
        self,
        level: int = 1,
        *,
        mode: str | None = None,
        tags: Sequence[str] | None = None,
        drain_timeout_s: float | None = None,
    ) -> SleepReport:
        """Put the model to sleep.

        Args:
            level: 0 only pauses, 1 keeps the weights restorable, 2 forgets them too.
            mode: what becomes of requests in flight: abort, wait or keep; None takes the server's default.
            tags: release only these.
            drain_timeout_s: how long `wait` waits; None takes the server's default.
        """
        return self._run(_sleep(level, mode, tags, drain_timeout_s))

    def wake_up(self, tags: Sequence[str] | None = None) -> WakeReport:
        """Wake the model, or only `tags` of it."""
        return self._run(_wake_up(tags))

    def is_sleeping(self) -> bool:
        """True until every tag is resident and loaded."""
        return self._run(_IS_SLEEPING)

    def pause(self, mode: str | None = None, *, drain_timeout_s: float | None = None) -> None:
        """Stop running requests, and release nothing."""
        self._run(_pause(mode, drain_timeout_s))

    def resume(self) -> None:
        """Undo `pause`."""
        self._run(_RESUME)

    def is_paused(self) -> bool:
        """True while a pause is in force."""
        return self._run(_IS_PAUSED)

    def update_weights(self, path: str) -> UpdateReport:
        """Write the tensors of a `.safetensors` file, or of a directory of them, at `path` on the server."""
        return self._run(_update_weights(path))

    def upload_weights(self, content: bytes | Iterable[bytes]) -> UpdateReport:
        """Write the tensors of a safetensors file that is sent: its bytes, an open file, or what yields them."""
        return self._run(_upload_weights(content))

    def reload_weights(self, path: str | None = None) -> UpdateReport:
        """Write every weight again, from the image or from a checkpoint at `path` on the server."""
        return self._run(_reload_weights(path))

    def reset_prefix_cache(self) -> None:
        """Forget cached prefixes."""
        self._run(_RESET_PREFIX_CACHE)

    def collective_rpc(self, method: str, args: Sequence[object] = ()) -> list[Any]:
        """Call a verb that changes nothing on every rank; one result a rank, as plain data."""
        return self._run(_collective_rpc(method, args))

    def restart_engine(self) -> float:
        """Start an engine anew that is dead or hangs, and wait until it is loaded; how many seconds that took."""
        return self._run(_RESTART_ENGINE)

    def state(self) -> ServerState:
        """All that the server knows of its engine, and what waking it would take."""
        return self._run(_STATE)

    def health(self) -> bool:
        """True if the model is loaded and its engine is well, asleep or not."""
        return self._run(_HEALTH)

    def ready(self) -> bool:
        """True if a request would be served now."""
        return self._run(_READY)

    def version(self) -> str:
        """The server's version."""
        return self._run(_VERSION)

    def close(self) -> None:
        """Close connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient:
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

    async def _run(self, call: _Call[T]) -> T:
        with translated(self._base_url):
            response = await self._http.request(call.method, self._base_url + call.path, **call.payload)
        return call.result(self._base_url, response)

    async def sleep(
        self,
        level: int = 1,
        *,
        mode: str | None = None,
        tags: Sequence[str] | None = None,
        drain_timeout_s: float | None = None,
    ) -> SleepReport:
        """As `Client.sleep`."""
        return await self._run(_sleep(level, mode, tags, drain_timeout_s))

    async def wake_up(self, tags: Sequence[str] | None = None) -> WakeReport:
        """As `Client.wake_up`."""
        return await self._run(_wake_up(tags))

    async def is_sleeping(self) -> bool:
        """As `Client.is_sleeping`."""
        return await self._run(_IS_SLEEPING)

    async def pause(self, mode: str | None = None, *, drain_timeout_s: float | None = None) -> None:
        """As `Client.pause`."""
        await self._run(_pause(mode, drain_timeout_s))

    async def resume(self) -> None:
        """As `Client.resume`."""
        await self._run(_RESUME)

    async def is_paused(self) -> bool:
        """As `Client.is_paused`."""
        return await self._run(_IS_PAUSED)

    async def update_weights(self, path: str) -> UpdateReport:
        """As `Client.update_weights`."""
        return await self._run(_update_weights(path))

    async def upload_weights(self, content: bytes | AsyncIterable[bytes]) -> UpdateReport:
        """As `Client.upload_weights`."""
        return await self._run(_upload_weights(content))

    async def reload_weights(self, path: str | None = None) -> UpdateReport:
        """As `Client.reload_weights`."""
        return await self._run(_reload_weights(path))

    async def reset_prefix_cache(self) -> None:
        """As `Client.reset_prefix_cache`."""
        await self._run(_RESET_PREFIX_CACHE)

    async def collective_rpc(self, method: str, args: Sequence[object] = ()) -> list[Any]:
        """As `Client.collective_rpc`."""
        return await self._run(_collective_rpc(method, args))

    async def restart_engine(self) -> float:
        """As `Client.restart_engine`."""
        return await self._run(_RESTART_ENGINE)

    async def state(self) -> ServerState:
        """As `Client.state`."""
        return await self._run(_STATE)

    async def health(self) -> bool:
        """As `Client.health`."""
        return await self._run(_HEALTH)

    async def ready(self) -> bool:
        """As `Client.ready`."""
        return await self._run(_READY)

    async def version(self) -> str:
        """As `Client.version`."""
        return await self._run(_VERSION)

    async def aclose(self) -> None:
        """Close connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()
