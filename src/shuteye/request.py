"""What a caller asks for: sampling parameters and generation requests, validated once.

Knows nothing of engines, tensors or HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from shuteye.errors import InvalidRequest

DrainMode = Literal["abort", "wait", "keep"]
"""What becomes of requests in flight when the gate closes."""

OutputKind = Literal["cumulative", "delta", "final_only"]
"""Whether each yielded output repeats everything so far, only what is new, or comes once at the end."""

MAX_LOGPROBS = 20


def _require(ok: bool, param: str, expected: str, seen: object) -> None:
    if not ok:
        raise InvalidRequest(f"{param} must be {expected}, got {seen!r}.", param=param)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when generation stops; field meanings as in vLLM's SamplingParams.

    Attributes:
        n: completions per prompt.
        temperature: 0 is greedy.
        top_k: keep the k likeliest tokens; 0 or -1 keeps all.
        min_p: keep tokens at least this fraction as likely as the likeliest.
        repetition_penalty: > 1 discourages tokens in prompt or output (CTRL, arXiv:1909.05858).
        max_tokens: `None` means up to the context limit.
        logprobs: how many alternatives per token to report; `None` reports nothing.

    Raises:
        InvalidRequest: a value is out of range; `param` names it.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = 16
    logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        _require(1 <= self.n <= 128, "n", "between 1 and 128", self.n)
        _require(0.0 <= self.temperature <= 100.0, "temperature", "between 0 and 100", self.temperature)
        _require(0.0 < self.top_p <= 1.0, "top_p", "in (0, 1]", self.top_p)
        _require(self.top_k >= -1, "top_k", "-1, 0 or positive", self.top_k)
        _require(0.0 <= self.min_p <= 1.0, "min_p", "in [0, 1]", self.min_p)
        _require(0.0 < self.repetition_penalty <= 10.0, "repetition_penalty", "in (0, 10]", self.repetition_penalty)
        _require(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "in [-2, 2]", self.presence_penalty)
        _require(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "in [-2, 2]", self.frequency_penalty)
        _require(all(self.stop_strings), "stop", "made of non-empty strings", self.stop)
        _require(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "at least 1", self.max_tokens)
        _require(self.min_tokens >= 0, "min_tokens", "at least 0", self.min_tokens)
        _require(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            "min_tokens",
            f"at most max_tokens ({self.max_tokens})",
            self.min_tokens,
        )
        _require(
            self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
            "logprobs",
            f"between 0 and {MAX_LOGPROBS}",
            self.logprobs,
        )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, however it was given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def greedy(self) -> bool:
        """True if the likeliest token is always chosen."""
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One sequence to generate, as the engine core sees it: ids, not text; `n` is already fanned out."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
