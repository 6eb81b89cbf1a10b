"""What a request says of single tokens: biases, the only ones allowed, sequences never completed, and grammar masks.

Knows nothing of penalties, temperature, or of how a token is drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from shuteye.plans import TokenMask
from shuteye.request import SamplingParams


@dataclass(slots=True)
class TokenRules:
    """The rules of one request; `output` is what it has generated, kept only if there are bad sequences."""

    biased_ids: torch.Tensor
    biases: torch.Tensor
    allowed_ids: torch.Tensor | None
    bad: tuple[tuple[int, ...], ...]
    output: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, params: SamplingParams, *, device: torch.device) -> TokenRules | None:
        """The rules of a request, or None if it has none. Frontends have checked that all ids are in the vocabulary."""
        bias = params.logit_bias or {}
        allowed = params.allowed_token_ids
        if not bias and allowed is None and not params.bad_token_ids:
            return None
        return cls(
            biased_ids=torch.tensor(list(bias), dtype=torch.long, device=device),
            biases=torch.tensor(list(bias.values()), dtype=torch.float32, device=device),
            allowed_ids=None if allowed is None else torch.tensor(allowed, dtype=torch.long, device=device),
            bad=tuple(tuple(sequence) for sequence in params.bad_token_ids),
        )

    def apply(self, row: torch.Tensor) -> None:
        """Change one request's logits [vocab_size] in place."""
        self.restrict(row)
        for sequence in self.bad:
            *before, last = sequence
            if not before or self.output[-len(before) :] == before:
                row[last] = -math.inf
        row[self.biased_ids] += self.biases

    def restrict(self, row: torch.Tensor) -> None:
        """Leave only the allowed tokens, if some are named."""
        if self.allowed_ids is not None:
            kept = row[self.allowed_ids]
            row.fill_(-math.inf)
            row[self.allowed_ids] = kept

    def record(self, token_id: int) -> None:
        """One more token was chosen."""
        if self.bad:
            self.output.append(token_id)


def apply_mask(row: torch.Tensor, mask: TokenMask) -> None:
    """Set what a grammar forbids to -inf in logits [vocab_size], in place."""
    bits = np.unpackbits(np.frombuffer(mask.bits, dtype=np.uint8), bitorder="little")[: len(row)]
    forbidden = torch.ones(len(row), dtype=torch.bool)
    forbidden[: len(bits)] = torch.from_numpy(bits == 0)
    row.masked_fill_(forbidden.to(row.device), -math.inf)


def leave_some_token(row: torch.Tensor, raw: torch.Tensor, *, rules: TokenRules | None, mask: TokenMask | None) -> None:
    """Lift every rule but the allowed tokens and the grammar if together they leave no token; in place.

    So do `min_tokens` and bad words yield where the grammar, or `allowed_token_ids`, has only one way to go on.
    """
    if row.max() > -math.inf:
        return
    row.copy_(raw)
    if rules is not None:
        rules.restrict(row)
    if mask is not None:
        apply_mask(row, mask)
