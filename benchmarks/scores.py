"""How well a text is foretold: perplexities of shuteye, a reference and llama.cpp, and how far apart single tokens are.

Knows only arrays of log-probabilities.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from machine import Machine

MOST_PERCENT = 0.5
"""What shuteye's perplexity may differ from that of the dequantized weights."""


@dataclass(frozen=True, slots=True)
class Scores:
    """One format.

    Attributes:
        tokens: how many were scored.
        shuteye, reference: perplexities of all of them.
        apart: root mean square of shuteye's log-probabilities less the reference's, token by token; of the tokens that
            llama.cpp scored, if it did.
        llama_tokens: how many llama.cpp scored, the second halves of windows; 0 if it was not asked.
        llama_perplexity, llama_reference: of these tokens, llama.cpp's and the reference's.
        llama_apart, llama_from_shuteye: as `apart`: llama.cpp's from the reference's, and from shuteye's.
    """

    format: str
    tokens: int
    shuteye: float
    reference: float
    apart: float
    llama_tokens: int = 0
    llama_perplexity: float = 0.0
    llama_reference: float = 0.0
    llama_apart: float = 0.0
    llama_from_shuteye: float = 0.0

    @classmethod
    def of(
        cls, form: str, *, ours: NDArray[Any], reference: NDArray[Any], llama_cpp: NDArray[Any] | None = None
    ) -> Scores:
        """From log-probabilities of the same tokens; NaN in `llama_cpp` is a token that it did not score."""
        plain = cls(form, ours.size, perplexity(ours), perplexity(reference), distance(ours, reference))
        if llama_cpp is None:
            return plain
        both = ~np.isnan(llama_cpp)
        mine, true, theirs = ours[both], reference[both], llama_cpp[both]
        return cls(
            **plain.as_dict()
            | {
                "apart": distance(mine, true),
                "llama_tokens": theirs.size,
                "llama_perplexity": perplexity(theirs),
                "llama_reference": perplexity(true),
                "llama_apart": distance(theirs, true),
                "llama_from_shuteye": distance(theirs, mine),
            }
        )

    @property
    def percent(self) -> float:
        """By how much shuteye's perplexity is larger than the reference's."""
        return (self.shuteye / self.reference - 1) * 100

    @property
    def llama_percent(self) -> float:
        """The same of llama.cpp's; 0 if it was not asked."""
        return 0.0 if not self.llama_tokens else (self.llama_perplexity / self.llama_reference - 1) * 100

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def in_words(self) -> str:
        told = (
            f"{self.format}: perplexity {self.shuteye:.4f}, transformers {self.reference:.4f} ({self.percent:+.3f}%), "
            f"{self.tokens:,} tokens; apart by {self.apart:.4f}"
        )
        if not self.llama_tokens:
            return told
        return (
            f"{told}; llama.cpp {self.llama_percent:+.3f}% of {self.llama_tokens:,} tokens, apart "
            f"{self.llama_apart:.4f}, from shuteye {self.llama_from_shuteye:.4f}"
        )


@dataclass(frozen=True, slots=True)
class ScoreReport:
    """Every format of one model, on one machine."""

    date: str
    machine: Machine
    scores: tuple[Scores, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> ScoreReport:
        scores = tuple(Scores(**each) for each in found["scores"])
        return cls(found["date"], Machine.from_dict(found["machine"]), scores)


def perplexity(logprobs: NDArray[Any]) -> float:
    return float(np.exp(-np.mean(logprobs)))


def distance(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean((one - other) ** 2)))
