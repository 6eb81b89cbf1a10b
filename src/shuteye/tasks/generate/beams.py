"""Beam search without a model: which beams there are, which continuations are kept, and which ones win. Pure.

The algorithm is vLLM's and transformers': every beam is continued by twice as many tokens as there are beams; those
that end leave, the likeliest of the others are the next beams. What has the best score in the end is the answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from shuteye.tasks.generate.requests import FinishReason, Logprob
from shuteye.typed_fields import require, settle_types


@dataclass(frozen=True, slots=True)
class BeamSearchParams:
    """How beams are searched; vLLM's names.

    Attributes:
        beam_width: how many beams there are, and completions in the end.
        length_penalty: exponent on the length that a score is divided by: larger favors longer completions.
        logprobs: how many alternatives per token to report; None reports nothing.
        priority, cache_salt: see `SamplingParams`.

    Raises:
        InvalidRequest: a value is of another type or out of range; `param` names it.
    """

    beam_width: int
    max_tokens: int
    length_penalty: float = 1.0
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    priority: int = 0
    cache_salt: str | None = None

    def __post_init__(self) -> None:
        settle_types(self)
        require(1 <= self.beam_width <= 128, "beam_width", "between 1 and 128", self.beam_width)
        require(self.max_tokens >= 1, "max_tokens", "at least 1", self.max_tokens)
        require(-10.0 <= self.length_penalty <= 10.0, "length_penalty", "in [-10, 10]", self.length_penalty)

    @property
    def num_candidates(self) -> int:
        """Continuations of each beam that are looked at: enough even if one half of them ends."""
        return 2 * self.beam_width


@dataclass(frozen=True, slots=True)
class Beam:
    """One beam: its tokens so far, how likely they are, and what else was likely at each of them."""

    token_ids: tuple[int, ...] = ()
    logprob: float = 0.0
    logprobs: tuple[Mapping[int, Logprob], ...] = ()
    finish_reason: FinishReason = "length"

    def score(self, length_penalty: float) -> float:
        """By which finished beams are compared; the length includes a token that ended it."""
        return _score(self.logprob, len(self.token_ids), length_penalty)

    def continued(self, token_id: int, candidates: Mapping[int, Logprob]) -> Beam:
        """With one more token, which is one of the candidates."""
        logprob = self.logprob + candidates[token_id].logprob
        return Beam((*self.token_ids, token_id), logprob, (*self.logprobs, candidates))


def _score(logprob: float, length: int, length_penalty: float) -> float:
    divisor: float = max(1, length) ** length_penalty
    return logprob / divisor


@dataclass(slots=True)
class BeamSearch:
    """The search for one prompt's completions: `live` beams, and those that are `done`."""

    params: BeamSearchParams
    eos_token_ids: frozenset[int]
    live: Sequence[Beam] = (Beam(),)
    done: tuple[Beam, ...] = ()
    length: int = 0
    aborted: bool = False

    def advance(self, candidates: Sequence[Mapping[int, Logprob]]) -> None:
        """Take what may follow each of the live beams, in their order."""
        ends = frozenset() if self.params.ignore_eos else self.eos_token_ids
        grown = [
            beam.continued(token_id, tokens)
            for beam, tokens in zip(self.live, candidates, strict=True)
            for token_id in tokens
        ]
        ended = [replace(beam, finish_reason="stop") for beam in grown if beam.token_ids[-1] in ends]
        going = [beam for beam in grown if beam.token_ids[-1] not in ends]
        self.done = self._best((*self.done, *ended))
        self.live = sorted(going, key=lambda beam: beam.logprob, reverse=True)[: self.params.beam_width]
        self.length += 1

    def abort(self) -> None:
        """What is there is all that there will be."""
        self.live = [replace(beam, finish_reason="abort") for beam in self.live]
        self.aborted = True

    @property
    def is_over(self) -> bool:
        """Whether further steps change nothing: all that live are at their limit, or cannot win any more."""
        if self.aborted or not self.live or self.length >= self.params.max_tokens:
            return True
        if len(self.done) < self.params.beam_width:
            return False
        # no token makes a beam likelier; at its best its length may still become
        best = max(beam.logprob for beam in self.live)
        lengths = (self.length + 1, self.params.max_tokens)
        return self._score_of(self.done[-1]) >= max(
            _score(best, length, self.params.length_penalty) for length in lengths
        )

    def winners(self) -> tuple[Beam, ...]:
        """The best of all, the best first; of beams that live only such as may not go on."""
        stopped = self.aborted or self.length >= self.params.max_tokens
        return self._best((*self.done, *(self.live if stopped else ())))

    def _best(self, beams: Iterable[Beam]) -> tuple[Beam, ...]:
        return tuple(sorted(beams, key=self._score_of, reverse=True)[: self.params.beam_width])

    def _score_of(self, beam: Beam) -> float:
        return beam.score(self.params.length_penalty)
