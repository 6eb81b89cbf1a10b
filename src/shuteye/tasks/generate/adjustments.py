"""What changes logits before a token is drawn: penalties of what was seen, biases, allowed tokens, bad words, masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from shuteye.tasks.generate.candidates import Floats, Int64s
from shuteye.tasks.generate.plans import TokenMask
from shuteye.tasks.generate.requests import SamplingParams

_LEAST_ROOM = 64


@dataclass(slots=True)
class SeenTokens:
    """The penalties of one request, and which tokens its sequence has had.

    Attributes:
        places: of every token seen → where it stands in `ids` and `counts`, which have room for more.
        counts: how often each was put out; 0 of those of the prompt alone.
    """

    repetition: float
    presence: float
    frequency: float
    places: dict[int, int]
    ids: Int64s
    counts: Floats

    @classmethod
    def of(
        cls, params: SamplingParams, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int] = ()
    ) -> SeenTokens | None:
        """What a sequence has so far, or None if the request has no penalties."""
        penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        if penalties == (1.0, 0.0, 0.0):
            return None
        ids = np.unique(np.asarray(prompt_token_ids, dtype=np.int64))
        places = {token_id: place for place, token_id in enumerate(ids.tolist())}
        seen = cls(*penalties, places, ids, np.zeros(len(ids), dtype=np.float32))
        for token_id in output_token_ids:
            seen.record(token_id)
        return seen

    def penalize(self, row: Floats) -> None:
        """Change the request's logits [vocab_size] in place.

        Repetition (CTRL, arXiv:1909.05858) looks at prompt and output; presence and frequency at the output only.
        """
        ids, counts = self.ids[: len(self.places)], self.counts[: len(self.places)]
        chosen = row[ids]
        repeated = np.where(chosen > 0, chosen / self.repetition, chosen * self.repetition)
        row[ids] = repeated - self.frequency * counts - self.presence * (counts > 0)

    def record(self, token_id: int) -> None:
        """One more token was put out."""
        place = self.places.setdefault(token_id, len(self.places))
        if place == len(self.ids):
            room = max(_LEAST_ROOM, len(self.ids))
            self.ids = np.append(self.ids, np.zeros(room, dtype=np.int64))
            self.counts = np.append(self.counts, np.zeros(room, dtype=np.float32))
        self.ids[place] = token_id
        self.counts[place] += 1


@dataclass(slots=True)
class TokenRules:
    """The rules of one request; `output` is what it has generated, kept only if there are bad sequences."""

    biased_ids: Int64s
    biases: Floats
    allowed_ids: Int64s | None
    bad: tuple[tuple[int, ...], ...]
    output: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, params: SamplingParams) -> TokenRules | None:
        """The rules of a request, or None if it has none. Frontends have checked that all ids are in the vocabulary."""
        bias = params.logit_bias or {}
        allowed = params.allowed_token_ids
        if not bias and allowed is None and not params.bad_token_ids:
            return None
        return cls(
            biased_ids=np.asarray(list(bias), dtype=np.int64),
            biases=np.asarray(list(bias.values()), dtype=np.float32),
            allowed_ids=None if allowed is None else np.asarray(allowed, dtype=np.int64),
            bad=tuple(tuple(sequence) for sequence in params.bad_token_ids),
        )

    def apply(self, row: Floats) -> None:
        """Change one request's logits [vocab_size] in place."""
        self.restrict(row)
        for sequence in self.bad:
            *before, last = sequence
            if not before or self.output[-len(before) :] == before:
                row[last] = -math.inf
        row[self.biased_ids] += self.biases

    def restrict(self, row: Floats) -> None:
        """Leave only the allowed tokens, if some are named."""
        if self.allowed_ids is not None:
            kept = row[self.allowed_ids]
            row.fill(-math.inf)
            row[self.allowed_ids] = kept

    def record(self, token_id: int) -> None:
        """One more token was chosen."""
        if self.bad:
            self.output.append(token_id)


def apply_mask(row: Floats, mask: TokenMask) -> None:
    """Set what a grammar forbids to -inf in logits [vocab_size], in place."""
    bits = np.unpackbits(np.frombuffer(mask.bits, dtype=np.uint8), bitorder="little")[: len(row)]
    np.copyto(row[: len(bits)], -math.inf, where=bits == 0)
    row[len(bits) :] = -math.inf


def leave_some_token(row: Floats, raw: Floats, *, rules: TokenRules | None, mask: TokenMask | None) -> None:
    """Lift every rule but the allowed tokens and the grammar if together they leave no token; in place.

    So do `min_tokens` and bad words yield where the grammar, or `allowed_token_ids`, has only one way to go on.
    """
    if row.max() > -math.inf:
        return
    row[:] = raw
    if rules is not None:
        rules.restrict(row)
    if mask is not None:
        apply_mask(row, mask)
