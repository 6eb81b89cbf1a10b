"""Transports for httpx2 that wake a sleeping model and send the request again.

They wrap any other transport, so that any client built on httpx2 can use them.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import anyio
import httpx2

from shuteye.client.answers import error_from_response, is_sleeping
from shuteye.client.control import bearer
from shuteye.errors import ModelSleeping, WakeFailed

DEFAULT_WAKE_TIMEOUT_S = 300.0
MAX_WAKES = 3
"""How often one request may see the model asleep and go on: more than once only if it falls asleep again."""

MAX_KEPT_BODY = 64 * 2**20
"""Bytes of an uploaded form that are kept in memory, so that it can be sent again after a wake."""

FIRST_BACKOFF_S = 0.25
MAX_RETRY_AFTER_S = 30.0
"""A server that asks for a longer wait than this gets no retry; the caller sees its 503."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """A response that several requests can be given; each gets its own."""

    status: int
    headers: tuple[tuple[str, str], ...]
    content: bytes

    @staticmethod
    def of(response: httpx2.Response) -> _Answer:
        """The answer of a response that has been read; its content is decoded, so the headers of the wire go."""
        wire = {"content-encoding", "content-length", "transfer-encoding"}
        kept = tuple((name, value) for name, value in response.headers.multi_items() if name not in wire)
        return _Answer(response.status_code, kept, response.content)

    def response(self, request: httpx2.Request) -> httpx2.Response:
        """A response that has not been read, as clients expect of a transport."""
        stream = httpx2.ByteStream(self.content)
        return httpx2.Response(self.status, headers=list(self.headers), stream=stream, request=request)


_Outcome = _Answer | httpx2.TransportError | None
"""How a wake ended: the 503 that its waiters get, the error that they raise, or None if the model is awake."""


_SENT_TO = "shuteye_sent_to"
"""The extension of a request that says where its caller sent it; whatever follows a redirect inherits it."""


def _redirected_from(request: httpx2.Request) -> httpx2.URL | None:
    """Where the caller had sent a request that a redirect has brought to another origin; None for any other."""
    sent_to: httpx2.URL = request.extensions.setdefault(_SENT_TO, request.url)
    return None if sent_to.origin == request.url.origin else sent_to


def _not_woken(request: httpx2.Request, sent_to: httpx2.URL) -> _Answer:
    """For a sleeping model that a redirect led to: whoever answers there was not meant to get the admin key."""
    there, here = (str(url.copy_with(path="/", query=None, fragment=None)) for url in (request.url, sent_to))
    return _wake_failed(
        f"The model is asleep and was not woken: {here} redirected the request to {there}, and the admin key is sent "
        f"to no other origin than the caller's. If the model is served there, use {there} as base URL."
    )


def _settle(outcome: _Outcome) -> _Answer | None:
    if isinstance(outcome, httpx2.TransportError):
        raise outcome
    return outcome


def _outcome(response: httpx2.Response) -> _Answer | None:
    """What the answer to `POST /wake_up`, already read, means for those who wait."""
    if response.is_success:
        return None
    status, content = response.status_code, response.content
    if status == WakeFailed.status_code:
        return _Answer.of(response)
    refusal = error_from_response(status, content)
    return _wake_failed(
        f"The model is asleep, and the server refused to wake it ({status}: {refusal.message}). Check the "
        f"transport's admin_api_key, and that the server runs with --enable-sleep-mode."
    )


def _wake_failed(message: str) -> _Answer:
    """Our own 503, for what no retry of the same request can change."""
    kind = WakeFailed
    body = {"message": message, "type": kind.error_type, "param": None, "code": kind.status_code}
    # the openai client retries every 503 unless told not to,
    headers = (("content-type", "application/json"), ("x-should-retry", "false"))
    return _Answer(kind.status_code, headers, json.dumps({"error": body}).encode())


def _backoff_s(response: httpx2.Response, attempt: int) -> float | None:
    """Seconds before the model may be woken again, or None if that is too long; the first wake is at once."""
    if attempt == 0:
        return 0.0
    wait_s = max(FIRST_BACKOFF_S * 2 ** (attempt - 1), _retry_after_s(response))
    return wait_s if wait_s <= MAX_RETRY_AFTER_S else None


def _retry_after_s(response: httpx2.Response) -> float:
    """The Retry-After header, in seconds or as a date (RFC 9110, 10.2.3); 0 if there is none that can be read."""
    value = response.headers.get("retry-after", "0")
    if value.isdecimal():
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    return (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds()


def _fits_into_memory(request: httpx2.Request) -> bool:
    """True for a body of known and moderate length, such as a form with an audio file."""
    length = request.headers.get("Content-Length", "")
    return length.isdigit() and int(length) <= MAX_KEPT_BODY


def _is_replayable(request: httpx2.Request) -> bool:
    """True if the body is bytes; a stream may be spent after the first try."""
    return isinstance(request.stream, httpx2.ByteStream)


@dataclass(frozen=True, slots=True)
class _WakeCall:
    """How to wake the server that a request was meant for."""

    path: str
    headers: dict[bytes, bytes] = field(repr=False)
    timeout_s: float

    def request(self, url: httpx2.URL) -> httpx2.Request:
        timeout = httpx2.Timeout(self.timeout_s).as_dict()
        return httpx2.Request("POST", url, headers=self.headers, extensions={"timeout": timeout})

    def url(self, request: httpx2.Request) -> httpx2.URL:
        return request.url.copy_with(path=self.path, query=None, fragment=None)


class _LeaderGone(Exception):
    """Whoever was waking the model was interrupted; one of the others must do it."""


@dataclass(slots=True)
class _Flights:
    """At most one wake in flight per server, and its outcome for everyone who asked while, or before, it flew.

    `landed` counts finished wakes. A request notes it before it is sent: if it has grown by the time the model is
    found asleep, that wake answers for this request too, whether it worked or not.
    """

    landed: int = 0
    outcome: _Outcome = None
    running: Future[_Outcome] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def join(self, seen: int) -> tuple[Future[_Outcome], bool]:
        """The wake that answers for a request sent when `landed` was `seen`, and whether to fly it oneself."""
        with self.lock:
            if self.landed > seen:
                done: Future[_Outcome] = Future()
                done.set_result(self.outcome)
                return done, False
            if self.running is not None:
                return self.running, False
            self.running = Future()
            return self.running, True

    def land(self, flight: Future[_Outcome], outcome: _Outcome) -> None:
        """Tell all who wait."""
        with self.lock:
            self.landed += 1
            self.outcome = outcome
            self.running = None
        flight.set_result(outcome)

    @contextmanager
    def led(self, flight: Future[_Outcome]) -> Iterator[None]:
        """Hand the wake over to another waiter if this one is interrupted or cancelled."""
        try:
            yield
        finally:
            if not flight.done():
                with self.lock:
                    if self.running is flight:
                        self.running = None
                flight.set_exception(_LeaderGone())


class _ByServer:
    """The flights of each server that a transport talks to."""

    def __init__(self) -> None:
        self._flights: dict[httpx2.URL, _Flights] = {}
        self._lock = threading.Lock()

    def __getitem__(self, wake_url: httpx2.URL) -> _Flights:
        with self._lock:
            return self._flights.setdefault(wake_url, _Flights())


class WakingTransport(httpx2.BaseTransport):
    """Wakes a model that answers `ModelSleepingError`, once however many requests wait, and sends them again.

    Use it as `openai.OpenAI(http_client=httpx2.Client(transport=WakingTransport(admin_api_key=...)))`. A request is
    sent again only if its body is bytes; nothing of a response has been read by then. If waking fails, everyone who
    waited gets the failure's 503, and the next request tries again.

    Args:
        inner: the transport that really sends; by default a new `httpx2.HTTPTransport`.
        admin_api_key: sent with the wake, to the origin that the caller sent the request to and to no other: a model
            that a redirect to another origin leads to is not woken.
        wake_path: the wake route on that server.
        wake_timeout_s: for the wake itself.

    Raises:
        InvalidRequest: at construction, a key that no header can carry.
    """

    def __init__(
        self,
        inner: httpx2.BaseTransport | None = None,
        *,
        admin_api_key: str | None = None,
        wake_path: str = "/wake_up",
        wake_timeout_s: float = DEFAULT_WAKE_TIMEOUT_S,
    ) -> None:
        self._inner = httpx2.HTTPTransport() if inner is None else inner
        self._wake = _WakeCall(wake_path, bearer(admin_api_key), wake_timeout_s)
        self._flights = _ByServer()

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send `request`, waking the model in between if it sleeps."""
        sent_to = _redirected_from(request)
        flights = self._flights[self._wake.url(request)]
        if _fits_into_memory(request):
            request.read()  # from here on its body is bytes
        replayable = _is_replayable(request)
        for attempt in range(MAX_WAKES):
            seen = flights.landed
            response = self._inner.handle_request(request)
            if not replayable or response.status_code != ModelSleeping.status_code:
                return response
            response.read()
            wait_s = _backoff_s(response, attempt)
            if wait_s is None or not is_sleeping(response.status_code, response.content):
                return _Answer.of(response).response(request)
            if sent_to is not None:
                return _not_woken(request, sent_to).response(request)
            time.sleep(wait_s)
            failure = self._wake_once(flights, seen, self._wake.url(request))
            if failure is not None:
                return failure.response(request)
        return self._inner.handle_request(request)

    def _wake_once(self, flights: _Flights, seen: int, url: httpx2.URL) -> _Answer | None:
        while True:
            flight, leading = flights.join(seen)
            if leading:
                with flights.led(flight):
                    flights.land(flight, self._fly(url))
            try:
                return _settle(flight.result())
            except _LeaderGone:
                continue

    def _fly(self, url: httpx2.URL) -> _Outcome:
        try:
            response = self._inner.handle_request(self._wake.request(url))
            response.read()
        except httpx2.TransportError as error:
            return error
        return _outcome(response)

    def close(self) -> None:
        """Close the inner transport."""
        self._inner.close()


class AsyncWakingTransport(httpx2.AsyncBaseTransport):
    """`WakingTransport` for `httpx2.AsyncClient` and `openai.AsyncOpenAI`; for use in one event loop."""

    def __init__(
        self,
        inner: httpx2.AsyncBaseTransport | None = None,
        *,
        admin_api_key: str | None = None,
        wake_path: str = "/wake_up",
        wake_timeout_s: float = DEFAULT_WAKE_TIMEOUT_S,
    ) -> None:
        self._inner = httpx2.AsyncHTTPTransport() if inner is None else inner
        self._wake = _WakeCall(wake_path, bearer(admin_api_key), wake_timeout_s)
        self._flights = _ByServer()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send `request`, waking the model in between if it sleeps."""
        sent_to = _redirected_from(request)
        flights = self._flights[self._wake.url(request)]
        if _fits_into_memory(request):
            await request.aread()  # from here on its body is bytes
        replayable = _is_replayable(request)
        for attempt in range(MAX_WAKES):
            seen = flights.landed
            response = await self._inner.handle_async_request(request)
            if not replayable or response.status_code != ModelSleeping.status_code:
                return response
            await response.aread()
            wait_s = _backoff_s(response, attempt)
            if wait_s is None or not is_sleeping(response.status_code, response.content):
                return _Answer.of(response).response(request)
            if sent_to is not None:
                return _not_woken(request, sent_to).response(request)
            await anyio.sleep(wait_s)
            failure = await self._wake_once(flights, seen, self._wake.url(request))
            if failure is not None:
                return failure.response(request)
        return await self._inner.handle_async_request(request)

    async def _wake_once(self, flights: _Flights, seen: int, url: httpx2.URL) -> _Answer | None:
        while True:
            flight, leading = flights.join(seen)
            if leading:
                with flights.led(flight):
                    flights.land(flight, await self._fly(url))
            await _landed(flight)
            try:
                return _settle(flight.result())
            except _LeaderGone:
                continue

    async def _fly(self, url: httpx2.URL) -> _Outcome:
        try:
            response = await self._inner.handle_async_request(self._wake.request(url))
            await response.aread()
        except httpx2.TransportError as error:
            return error
        return _outcome(response)

    async def aclose(self) -> None:
        """Close the inner transport."""
        await self._inner.aclose()


async def _landed(flight: Future[_Outcome]) -> None:
    """Return once `flight` has an outcome."""
    event = anyio.Event()
    flight.add_done_callback(lambda _flight: event.set())  # called at once if it has one already
    await event.wait()
