"""Counts tokens the way OpenAI's `usage` reports them.

Knows nothing of prices.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from shuteye.outputs import RequestOutput
from shuteye.server.generation import Job


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
