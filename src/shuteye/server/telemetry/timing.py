"""One prompt timed from its arrival to its last token.

Knows nothing of what becomes of the times: `metrics.py` counts them, `tracing.py` makes spans of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shuteye.logs import REQUEST_ID

if TYPE_CHECKING:
    from shuteye.tasks.generate.requests import RequestOutput


PHASES = ("queue", "prefill", "decode")


@dataclass(frozen=True, slots=True)
class RequestTiming:
    """When one prompt passed through its phases, in seconds of the monotonic clock, and how it ended.

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

        Empty for what is not generated token by token, such as an embedding: it is not known when it left the queue.
        """
        if self.scheduled is None:
            never_left = self.first_token is None and "stop" not in self.outcome
            return {"queue": (self.arrived, self.ended)} if never_left else {}
        begins = [self.arrived, self.scheduled] + ([] if self.first_token is None else [self.first_token])
        ends = [*begins[1:], self.ended]
        return {name: (begin, end) for name, begin, end in zip(PHASES, begins, ends, strict=False)}


class RequestTimer:
    """Turns the outputs of one prompt into times; tokens that come together share their interval.

    Args:
        on_tokens: called with an interval in seconds and how many tokens of a choice came, each after that time.
        on_end: called once, with the times and why the prompt was lost, None if it ended in order.
    """

    def __init__(
        self, on_tokens: Callable[[float, int], None], on_end: Callable[[RequestTiming, str | None], None]
    ) -> None:
        self._on_tokens = on_tokens
        self._on_end = on_end
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
            self._on_tokens((now - previous) / count, count)
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
        self._on_end(served, failure)
