"""What a caller asks of a model that generates, validated once, and what comes of it. Plain data; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from shuteye.errors import InvalidRequest
from shuteye.typed_fields import require, settle_types

FinishReason = Literal["stop", "length", "abort"]


# --- generation ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's log-probability, and its rank in the vocabulary (1 is the likeliest)."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position: the chosen token's first, then the likeliest ones."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One completion of a prompt (vLLM's shape)."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: tuple[dict[int, Logprob], ...] | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """All completions of one prompt, so far or for good (vLLM's shape).

    `scheduled_at` is when it first got its place in the batch, in seconds of the system's monotonic clock.
    `prompt_logprobs`, if asked for, are there as soon as the whole prompt is computed; the first token has none.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    num_cached_tokens: int = 0
    scheduled_at: float | None = None
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None


WHOLE_VOCABULARY = -1
"""As a number of log-probabilities: one for every token."""
MAX_LOGPROB_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 100.0
MAX_TEXTS = 256
"""Stop strings of a request, and bad words: all of them are looked for after every token."""
MAX_TEXTS_CHARACTERS = 16_384
"""What they may come to, all together."""
MAX_STOP_TOKEN_IDS = 4096
MAX_SALT = 1024
MAX_TOP_K = 2**31 - 1
JSON_WHITESPACE = r"\r?\n[ \t]{0,40}|[ \t]{0,2}"
"""Between the parts of constrained JSON: what formatters write, but not the endless blanks of small models."""


def _require_few(texts: Sequence[str], param: str) -> None:
    length = sum(map(len, texts))
    if len(texts) > MAX_TEXTS or length > MAX_TEXTS_CHARACTERS:
        raise InvalidRequest(
            f"{param} has {len(texts):,} texts of {length:,} characters in all; at most {MAX_TEXTS} texts of "
            f"{MAX_TEXTS_CHARACTERS:,} characters are taken.",
            param=param,
        )


@dataclass(frozen=True, slots=True)
class StructuredOutputsParams:
    """What the whole output must be; exactly one of the first five fields says it (vLLM's names).

    Attributes:
        json: a JSON schema, as text or as an object.
        json_object: any JSON object.
        regex: a regular expression in Rust's syntax, which the whole output matches.
        choice: one of these texts.
        grammar: a context-free grammar, in llguidance's Lark or in GBNF.
        disable_any_whitespace: JSON without any whitespace between its parts.
        whitespace_pattern: a regular expression for whitespace in JSON, in place of ours.
        starts_after: the output is free up to and including this token id; None constrains it from its first token.
        param: the caller's field, which errors name.

    Raises:
        InvalidRequest: none or several are given, or one of another type.
    """

    json: str | dict[str, Any] | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None
    starts_after: int | None = None
    param: str = "structured_outputs"

    def __post_init__(self) -> None:
        settle_types(self, of=self.param, param=self.param)
        given = [name for name in ("json", "json_object", "regex", "choice", "grammar") if self._asks_for(name)]
        if len(given) != 1:
            raise InvalidRequest(
                f"{self.param} must have exactly one of json, json_object, regex, choice and grammar, got "
                f"{' and '.join(given) or 'none'}.",
                param=self.param,
            )
        if self.choice is not None and (not self.choice or not all(self.choice)):
            raise InvalidRequest(f"{self.param} must have non-empty choices, got {self.choice!r}.", param=self.param)

    def _asks_for(self, name: str) -> bool:
        return bool(self.json_object) if name == "json_object" else getattr(self, name) is not None


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
        logprobs: how many alternatives per token to report, -1 for the whole vocabulary; `None` reports nothing. How
            many there may be is for the engine's `max_logprobs` to say.
        logprob_token_ids: report these tokens instead, however likely they are; `logprobs` is left out then.
        prompt_logprobs: as `logprobs`, of the tokens of the prompt, which is then computed in full.
        logit_bias: added to the logits of single tokens, between -100 and 100.
        allowed_token_ids: all others are never chosen.
        bad_words: texts that are never completed.
        bad_token_ids: token sequences that are never completed; frontends make them of `bad_words`.
        structured_outputs: what the whole output must be.
        priority: requests with lower values leave the queue first.
        cache_salt: only requests with the same one share cached prefixes, so that nobody can learn by timing what
            others have sent.

    Raises:
        InvalidRequest: a value is of another type or out of range; `param` names it.
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
    logprob_token_ids: Sequence[int] | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    bad_token_ids: Sequence[Sequence[int]] = ()
    structured_outputs: StructuredOutputsParams | None = None
    priority: int = 0
    cache_salt: str | None = None

    def __post_init__(self) -> None:
        settle_types(self)
        require(1 <= self.n <= 128, "n", "between 1 and 128", self.n)
        require(0.0 <= self.temperature <= 100.0, "temperature", "between 0 and 100", self.temperature)
        require(0.0 < self.top_p <= 1.0, "top_p", "in (0, 1]", self.top_p)
        require(-1 <= self.top_k <= MAX_TOP_K, "top_k", f"-1, or between 0 and {MAX_TOP_K}", self.top_k)
        require(0.0 <= self.min_p <= 1.0, "min_p", "in [0, 1]", self.min_p)
        require(0.0 < self.repetition_penalty <= 10.0, "repetition_penalty", "in (0, 10]", self.repetition_penalty)
        require(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "in [-2, 2]", self.presence_penalty)
        require(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "in [-2, 2]", self.frequency_penalty)
        require(all(self.stop_strings), "stop", "made of non-empty strings", self.stop)
        _require_few(self.stop_strings, "stop")
        require(
            len(self.stop_token_ids) <= MAX_STOP_TOKEN_IDS,
            "stop_token_ids",
            f"at most {MAX_STOP_TOKEN_IDS:,} ids",
            len(self.stop_token_ids),
        )
        require(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "at least 1", self.max_tokens)
        salted = self.cache_salt is None or 0 < len(self.cache_salt) <= MAX_SALT
        require(salted, "cache_salt", f"a text of 1 to {MAX_SALT} characters", self.cache_salt)
        require(self.min_tokens >= 0, "min_tokens", "at least 0", self.min_tokens)
        require(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            "min_tokens",
            f"at most max_tokens ({self.max_tokens})",
            self.min_tokens,
        )
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            require(count is None or count >= WHOLE_VOCABULARY, name, "-1 (the whole vocabulary), or 0 or more", count)
        self._check_token_rules()

    def _check_token_rules(self) -> None:
        wanted = self.logprob_token_ids
        require(
            wanted is None or 0 < len(wanted) <= MAX_LOGPROB_TOKEN_IDS,
            "logprob_token_ids",
            f"a list of 1 to {MAX_LOGPROB_TOKEN_IDS} ids",
            None if wanted is None else f"{len(wanted)} ids",
        )
        require(
            wanted is None or self.logprobs in {None, len(wanted)},
            "logprobs",
            "left out where logprob_token_ids are given",
            self.logprobs,
        )
        biases = (self.logit_bias or {}).values()
        require(
            all(-MAX_LOGIT_BIAS <= bias <= MAX_LOGIT_BIAS for bias in biases),
            "logit_bias",
            f"made of numbers between -{MAX_LOGIT_BIAS:g} and {MAX_LOGIT_BIAS:g}",
            self.logit_bias,
        )
        require(
            self.allowed_token_ids is None or len(self.allowed_token_ids) > 0,
            "allowed_token_ids",
            "a list of at least one id",
            self.allowed_token_ids,
        )
        require(
            not isinstance(self.bad_words, str) and all(word.strip() for word in self.bad_words),
            "bad_words",
            "a list of texts that are not blank",
            self.bad_words,
        )
        _require_few(self.bad_words, "bad_words")
        require(
            self.allowed_token_ids is None or self.structured_outputs is None,
            "allowed_token_ids",
            "left out where the output's structure is given",
            self.allowed_token_ids,
        )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, however it was given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def reports_logprobs(self) -> bool:
        """Whether log-probabilities of what is generated are wanted."""
        return self.logprobs is not None or self.logprob_token_ids is not None

    @property
    def greedy(self) -> bool:
        """True if the likeliest token is always chosen."""
        return self.temperature == 0.0


class GenerateRequest(msgspec.Struct, frozen=True, tag=True):
    """One sequence to generate, as the engine core sees it: ids, not text; `n` is already fanned out."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams = msgspec.field(default_factory=SamplingParams)
