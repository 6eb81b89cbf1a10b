"""One prompt timed from its arrival to its last token, and the seam to whoever traces.

Knows nothing of OpenTelemetry; without tracing, nothing of it is imported (`tracing.py` is).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from shuteye.logs import REQUEST_ID

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from shuteye.tasks.generate.requests import RequestOutput


PHASES = ("queue", "prefill", "decode")


@dataclass(frozen=True, slots=True)
class RequestTiming:
    """When one prompt passed through its phases, in seconds of the monotonic clock, and what came of it.

    Attributes:
        scheduled: when it got its place in the batch; None if it never did.
        first_token: None if there was none.
        outcome: the finish reasons of its choices, or why it was lost.
    """

    request_id: str
    arrived: float
    ended: float
    scheduled: float | None
    first_token: float | None
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    outcome: tuple[str, ...]

    @property
    def phases(self) -> dict[str, tuple[float, float]]:
        """`queue`, `prefill` and `decode`, as far as it came: when each began and ended.

        None of what is not generated token by token, such as an embedding: nobody tells when it left the queue.
        """
        if self.scheduled is None:
            never_left = self.first_token is None and "stop" not in self.outcome
            return {"queue": (self.arrived, self.ended)} if never_left else {}
        begins = [self.arrived, self.scheduled] + ([] if self.first_token is None else [self.first_token])
        ends = [*begins[1:], self.ended]
        return {name: (begin, end) for name, begin, end in zip(PHASES, begins, ends, strict=False)}


class Tracer(Protocol):
    """Makes spans."""

    def around(self, app: ASGIApp) -> ASGIApp:
        """`app` with a span around each of its HTTP requests; spans made inside belong to it."""
        ...

    def prompt(self, served: RequestTiming) -> None:
        """A prompt has ended."""
        ...

    def transition(self, kind: str, seconds: float, attributes: Mapping[str, str | int | float | bool]) -> None:
        """A transition has just ended; it took `seconds`."""
        ...

    def close(self) -> None:
        """Send what is left."""
        ...


class RequestObserver(Protocol):
    """Who is told what was timed."""

    def observe_inter_token(self, seconds: float, count: int) -> None:
        """A choice's next `count` tokens came, each after `seconds`."""
        ...

    def observe_prompt(self, served: RequestTiming, *, failure: str | None) -> None:
        """A prompt has ended, in order or because of `failure`."""
        ...


class RequestTimer:
    """Turns the outputs of one prompt into times; tokens that come together share their interval."""

    def __init__(self, told: RequestObserver) -> None:
        self._told = told
        self._arrived = time.monotonic()
        self._first_token: float | None = None
        self._last: dict[int, float] = {}
        self._num_output_tokens = 0
        self._outcome: list[str] = []
        self._seen: RequestOutput | None = None
        self._over = False
        self._num_prompt_tokens = 0
        self._scheduled: float | None = None

    def observe(self, output: RequestOutput) -> None:
        """Account for one delta output."""
        now = time.monotonic()
        self._seen = output
        self._num_prompt_tokens = len(output.prompt_token_ids)
        self._scheduled = output.scheduled_at
        for completion in output.outputs:
            if completion.token_ids:
                self._observe_tokens(completion.index, len(completion.token_ids), now)
            if completion.finish_reason is not None:
                self._outcome.append(completion.finish_reason)
        if output.finished:
            self._end(now)

    def _observe_tokens(self, index: int, count: int, now: float) -> None:
        self._num_output_tokens += count
        if self._first_token is None:
            self._first_token = now
        previous = self._last.get(index)
        if previous is not None:
            self._told.observe_inter_token((now - previous) / count, count)
        self._last[index] = now

    def finish(self, *, num_prompt_tokens: int, scheduled_at: float | None = None) -> None:
        """It ended with a result that is not made of tokens, such as an embedding."""
        self._num_prompt_tokens = num_prompt_tokens
        self._scheduled = scheduled_at
        self._outcome.append("stop")
        self._end(time.monotonic())

    def lost(self, reason: str) -> None:
        """It ended without a last output; harmless if it had one."""
        if not self._over:
            self._outcome.append(reason)
            self._end(time.monotonic(), failure=reason)

    def _end(self, now: float, *, failure: str | None = None) -> None:
        self._over = True
        seen = self._seen
        served = RequestTiming(
            request_id=REQUEST_ID.get() or "",
            arrived=self._arrived,
            ended=now,
            scheduled=self._scheduled,
            first_token=self._first_token,
            num_prompt_tokens=self._num_prompt_tokens,
            num_output_tokens=self._num_output_tokens,
            num_cached_tokens=seen.num_cached_tokens if seen else 0,
            outcome=tuple(self._outcome),
        )
        self._told.observe_prompt(served, failure=failure)
