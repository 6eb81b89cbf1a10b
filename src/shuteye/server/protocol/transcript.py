"""Collects the delta outputs of one choice until it is whole, for answers that are not streamed.

Knows nothing of the shape of an answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from shuteye.outputs import CompletionOutput, FinishReason, Logprob


@dataclass(slots=True)
class Transcript:
    """All of one choice so far."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Mapping[int, Logprob]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def add(self, delta: CompletionOutput) -> None:
        """Append what is new."""
        self.texts.append(delta.text)
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(delta.logprobs or ())
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason

    @property
    def mean_logprob(self) -> float:
        """How likely the tokens were, by their log-probabilities, which must have been asked for."""
        found = [position[token_id].logprob for token_id, position in zip(self.token_ids, self.logprobs, strict=True)]
        return sum(found) / max(1, len(found))

    @property
    def text(self) -> str:
        """Everything generated."""
        return "".join(self.texts)
