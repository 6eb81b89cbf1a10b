"""What is told to tracing: a served prompt's phases, and transitions. The seam between what is timed and who traces.

Knows nothing of OpenTelemetry; without tracing, nothing of it is imported (`server/tracing.py` is).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from starlette.types import ASGIApp


PHASES = ("queue", "prefill", "decode")


@dataclass(frozen=True, slots=True)
class ServedPrompt:
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

    def prompt(self, served: ServedPrompt) -> None:
        """A prompt has ended."""
        ...

    def transition(self, kind: str, seconds: float, attributes: Mapping[str, str | int | float | bool]) -> None:
        """A transition has just ended; it took `seconds`."""
        ...

    def close(self) -> None:
        """Send what is left."""
        ...
