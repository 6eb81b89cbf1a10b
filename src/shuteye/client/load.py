"""Load on an OpenAI-compatible server: many streamed completions at once, every token timed; sleeps and wakes, too.

Sleeps and wakes need a shuteye server, or one with vLLM's routes.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import httpx2

from shuteye.client.answers import error_from_response, model_names
from shuteye.client.control import AsyncClient, bearer, server_root, translated
from shuteye.errors import InternalError, InvalidRequest, ShuteyeError

Route = Literal["completions", "chat"]

_TEXT = (
    "the of and to in that is was for it with as his on be at by had not are but from or have an they which one you "
    "were her all she there would their we him been has when who will more no if out so said what up its about into "
    "than them can only other new some could time these two may then do first any my now such like our over man me"
)
_WORDS = _TEXT.split()
"""Common words, about one token each in most vocabularies."""


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What to ask of a server.

    Attributes:
        num_prompt_words: prompts are random words, so that no two begin alike.
        ignore_eos: ask for exactly `max_tokens` tokens; a field that OpenAI itself does not know.

    Raises:
        InvalidRequest: a number is out of range.
    """

    model: str
    num_requests: int = 32
    concurrency: int = 4
    num_prompt_words: int = 128
    max_tokens: int = 128
    route: Route = "completions"
    ignore_eos: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("concurrency", "num_prompt_words", "max_tokens"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} must be at least 1, got {getattr(self, name)}.", param=name)
        if self.num_requests < 0:
            raise InvalidRequest(f"num_requests must not be negative, got {self.num_requests}.", param="num_requests")

    def body(self, index: int) -> dict[str, Any]:
        """The request of this index; the same again for the same seed."""
        text = " ".join(random.Random(f"{self.seed} {index}").choices(_WORDS, k=self.num_prompt_words))
        asked: dict[str, Any] = {
            "model": self.model,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        asked |= {"prompt": text} if self.route == "completions" else {"messages": [{"role": "user", "content": text}]}
        return asked | ({"ignore_eos": True} if self.ignore_eos else {})

    @property
    def path(self) -> str:
        """Where requests go."""
        return "/v1/completions" if self.route == "completions" else "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class TimedRequest:
    """One streamed answer. Times are seconds from its sending; `error` says why there is no whole answer."""

    first_token_s: float | None
    total_s: float
    gaps_s: tuple[float, ...] = ()
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    error: str | None = None

    @property
    def per_token_s(self) -> float | None:
        """Mean time of an output token after the first one."""
        if self.first_token_s is None or self.num_output_tokens < 2:
            return None
        return (self.total_s - self.first_token_s) / (self.num_output_tokens - 1)


@dataclass(frozen=True, slots=True)
class LoadResult:
    """All requests of a plan, and how long they took together."""

    requests: tuple[TimedRequest, ...]
    seconds: float

    @property
    def served(self) -> tuple[TimedRequest, ...]:
        """Those that were answered whole."""
        return tuple(one for one in self.requests if one.error is None)

    @property
    def output_tokens_per_s(self) -> float:
        """Of all streams together."""
        return sum(one.num_output_tokens for one in self.served) / self.seconds if self.seconds else 0.0

    @property
    def requests_per_s(self) -> float:
        """Whole answers."""
        return len(self.served) / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class Cycle:
    """One sleep and wake, as the caller saw it; `first_token_s` counts from the call that woke."""

    sleep_s: float
    freed_bytes: int
    residual_bytes: int
    wake_s: float
    first_token_s: float


class LoadGenerator:
    """Asks one server; an async context manager.

    Args:
        base_url: the server's root; a `/v1` at its end is left out.
        transport: instead of real connections, for tests.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self._base_url = server_root(base_url)
        limits = httpx2.Limits(max_connections=None)
        headers = bearer(api_key, name="api_key")
        self._http = httpx2.AsyncClient(headers=headers, timeout=timeout_s, limits=limits, transport=transport)

    async def __aenter__(self) -> LoadGenerator:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._http.aclose()

    async def first_model(self) -> str:
        """The name that the server lists first.

        Raises:
            AuthenticationFailed: the key is wrong or missing; `param` is `api_key`.
            ShuteyeError: there is no server, or it is none that serves models.
        """
        url = f"{self._base_url}/v1/models"
        with translated(self._base_url):
            response = await self._http.get(url)
        return model_names(url, response.status_code, response.content)[0]

    async def run(self, plan: LoadPlan) -> LoadResult:
        """All requests of `plan`, `concurrency` of them at any time."""
        indices = iter(range(plan.num_requests))
        done: list[TimedRequest] = []
        began = time.perf_counter()
        await asyncio.gather(*(self._work(plan, indices, done) for _ in range(plan.concurrency)))
        return LoadResult(tuple(done), time.perf_counter() - began)

    async def _work(self, plan: LoadPlan, indices: Iterator[int], done: list[TimedRequest]) -> None:
        for index in indices:
            answer = await self.ask(plan, index)
            done.append(answer)

    async def ask(self, plan: LoadPlan, index: int) -> TimedRequest:
        """One request, streamed to its end; a failure is part of the result."""
        began = time.perf_counter()
        stream = _Stream(began)
        try:
            async with self._http.stream("POST", self._base_url + plan.path, json=plan.body(index)) as response:
                if not response.is_success:
                    raise error_from_response(response.status_code, await response.aread())
                async for line in response.aiter_lines():
                    stream.take(line)
        except (httpx2.HTTPError, ShuteyeError, ValueError) as error:
            stream.error = f"{type(error).__name__}: {error}"
        return stream.result()

    async def cycle(self, plan: LoadPlan, control: AsyncClient, index: int, *, level: int) -> Cycle:
        """Put the model to sleep, wake it, and ask for one answer.

        Raises:
            ShuteyeError: it did not sleep or wake, or did not answer afterwards.
        """
        began = time.perf_counter()
        slept = await control.sleep(level, mode="wait")
        asleep = time.perf_counter()
        await control.wake_up()
        awake = time.perf_counter()
        answer = await self.ask(plan, index)
        if answer.error is not None or answer.first_token_s is None:
            raise InternalError(f"After a wake there was no answer: {answer.error or 'it has no token'}.")
        return Cycle(
            sleep_s=asleep - began,
            freed_bytes=slept.freed_bytes,
            residual_bytes=slept.residual_bytes,
            wake_s=awake - asleep,
            first_token_s=awake - asleep + answer.first_token_s,
        )


class _Stream:
    """Events of one answer as they come."""

    def __init__(self, began: float) -> None:
        self.error: str | None = None
        self._began = began
        self._marks: list[float] = []
        self._usage: Mapping[str, int] = {}
        self._whole = False

    def take(self, line: str) -> None:
        if not line.startswith("data:"):
            return
        now = time.perf_counter()
        payload = line[5:].strip()
        if payload == "[DONE]":
            self._whole = True
            return
        found = json.loads(payload)
        if "error" in found:
            raise InternalError(str(found["error"].get("message", found["error"])))
        self._usage = found.get("usage") or self._usage
        if any(choice.get("finish_reason") == "abort" for choice in found.get("choices", ())):
            self.error = "The server ended it before it was done (finish_reason: abort), as a sleep or a pause does."
        if any(_has_text(choice) for choice in found.get("choices", ())):
            self._marks.append(now)

    def result(self) -> TimedRequest:
        ended = time.perf_counter()
        marks = self._marks
        return TimedRequest(
            first_token_s=marks[0] - self._began if marks else None,
            total_s=ended - self._began,
            gaps_s=tuple(after - before for before, after in pairwise(marks)),
            num_prompt_tokens=self._usage.get("prompt_tokens", 0),
            num_output_tokens=self._usage.get("completion_tokens", len(marks)),
            error=self.error or (None if self._whole else "The stream ended before [DONE]."),
        )


def _has_text(choice: Mapping[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    return bool(choice.get("text") or delta.get("content") or delta.get("reasoning_content"))


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of them lie, between neighbours; `values` must not be empty."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
