"""What answers of generation share: token counts as `usage`, choices collected until whole, chunks of a stream.

Knows nothing of the shape of a choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from shuteye.server.generation.run import Job
from shuteye.server.http.events import event
from shuteye.tasks.generate.requests import CompletionOutput, FinishReason, Logprob, RequestOutput


@dataclass(slots=True)
class Usage:
    """Tokens of one HTTP request, over all of its prompts and choices."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: dict[int, int] = field(default_factory=dict)
    counts_output: bool = True

    @classmethod
    def of(cls, job: Job) -> Usage:
        """Before anything is generated."""
        return cls(sum(len(prompt.token_ids) for prompt in job.prompts), counts_output=not job.echoes_only)

    def add(self, prompt_index: int, output: RequestOutput) -> None:
        """Count one delta output."""
        if self.counts_output:
            self.completion_tokens += sum(len(completion.token_ids) for completion in output.outputs)
        self.cached_tokens[prompt_index] = max(self.cached_tokens.get(prompt_index, 0), output.num_cached_tokens)

    def as_dict(self) -> dict[str, Any]:
        """OpenAI's `usage` object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached_tokens.values())},
        }


@dataclass(slots=True)
class ChoiceAccumulator:
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


encode_json = msgspec.json.Encoder().encode


class ChunkWriter:
    """Makes events of choices; if usage is to come, every chunk but the last carries `usage: null`, or usage so far."""

    def __init__(self, envelope: dict[str, Any], *, include_usage: bool, continuous_usage: bool = False) -> None:
        self._head = encode_json(envelope)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}' if include_usage else b"]}"
        self.include_usage = include_usage
        self.continuous_usage = continuous_usage

    def choice(self, choice: dict[str, Any], usage: Usage | None = None, extra: dict[str, Any] | None = None) -> bytes:
        """An event with one choice, and perhaps with the usage so far and other fields."""
        tail = self._tail if usage is None else b'],"usage":' + encode_json(usage.as_dict()) + b"}"
        if extra:
            tail = tail[:-1] + b"," + encode_json(extra)[1:]
        return event(self._head + encode_json(choice) + tail)

    def usage(self, usage: Usage) -> bytes:
        """The event that ends a stream with `stream_options.include_usage`."""
        return event(self._head + b'],"usage":' + encode_json(usage.as_dict()) + b"}")
