"""How many log-probabilities a request may ask for, each of which is computed, sent and written out. No torch."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from shuteye.errors import InvalidRequest
from shuteye.model_info import MAX_LOGPROBS, ModelInfo
from shuteye.tasks.generate.requests import WHOLE_VOCABULARY, SamplingParams

NARROW = MAX_LOGPROBS
"""Alternatives per token that cost little beside the model's own step."""

MAX_WIDE_LOGPROBS = 1 << 21
"""Log-probabilities of a request that wants more than `NARROW` a token, over its prompts and all that it generates."""

MAX_LOGPROBS_PER_STEP = 1 << 16
"""Of the prompt of one request in one step: wide ones are computed a few positions at a time."""


def scored_per_step(num_top: int, at_most: int) -> int:
    """How many positions of a prompt may be scored in one step."""
    return max(1, min(at_most, MAX_LOGPROBS_PER_STEP // (num_top + 1)))


def is_wide(params: SamplingParams) -> bool:
    """Whether writing out what is asked for takes so long that others should not have to wait for it."""
    return max(params.logprobs or 0, params.prompt_logprobs or 0) > NARROW


@dataclass(frozen=True, slots=True)
class LogprobLimits:
    """What one model gives; `max_logprobs` alternatives per token, -1 for its whole vocabulary."""

    vocab_size: int
    max_logprobs: int = MAX_LOGPROBS
    max_model_len: int = sys.maxsize

    @classmethod
    def of(cls, info: ModelInfo) -> LogprobLimits:
        """The limits of a loaded model."""
        return cls(info.vocab_size, info.max_logprobs, info.max_model_len)

    @property
    def per_token(self) -> int:
        """Most alternatives for one token."""
        return self.vocab_size if self.max_logprobs == WHOLE_VOCABULARY else self.max_logprobs

    def resolved(
        self, params: SamplingParams, *, num_prompt_tokens: int, num_prompts: int = 1, param: str = "logprobs"
    ) -> SamplingParams:
        """The parameters with numbers in place of -1.

        Args:
            num_prompt_tokens: of all prompts.
            param: what the caller calls `logprobs`.

        Raises:
            InvalidRequest: more for one token than `per_token`, or too many of them in all; the error names the field.
        """
        given = {param: params.logprobs, "prompt_logprobs": params.prompt_logprobs}
        numbers = {name: self._number(name, count) for name, count in given.items() if count is not None}
        if not numbers:
            return params
        longest = self.max_model_len if params.max_tokens is None else min(params.max_tokens, self.max_model_len)
        positions = {param: num_prompts * params.n * longest, "prompt_logprobs": num_prompt_tokens}
        wide = {name: positions[name] * (number + 1) for name, number in numbers.items() if number > NARROW}
        if sum(wide.values()) > MAX_WIDE_LOGPROBS:
            raise InvalidRequest(
                f"The request asks for up to {sum(wide.values()):,} log-probabilities (tokens × alternatives); at most "
                f"{MAX_WIDE_LOGPROBS:,} are given where there are more than {NARROW} a token. Ask for fewer, or for "
                "fewer tokens (max_tokens).",
                param=max(wide, key=lambda name: wide[name]),
            )
        return replace(params, logprobs=numbers.get(param), prompt_logprobs=numbers.get("prompt_logprobs"))

    def _number(self, name: str, count: int) -> int:
        number = self.vocab_size if count == WHOLE_VOCABULARY else count
        if number > self.per_token:
            raise InvalidRequest(
                f"{name} is {count}, which is {number:,} alternatives for each token; at most {self.per_token:,} are "
                "given here (--max-logprobs).",
                param=name,
            )
        return number
