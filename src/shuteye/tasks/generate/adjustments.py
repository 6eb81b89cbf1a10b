"""What changes logits before a token is drawn: penalties of what was seen, biases, allowed tokens, bad words, masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from shuteye.tasks.generate.plans import TokenMask
from shuteye.tasks.generate.requests import SamplingParams

_FIRST_CAPACITY = 8


@dataclass(frozen=True, slots=True)
class PenaltyRows:
    """The rows of a batch that carry penalties; every tensor is [num_rows] or [num_rows, 1]."""

    rows: torch.Tensor
    slots: torch.Tensor
    repetition: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor


class TokenCounts:
    """Counts of output tokens and marks of prompt tokens, one slot per sequence with penalties.

    Slots are rows of two dense tables [capacity, vocab_size]; they cost memory only while such sequences live.
    """

    def __init__(self, *, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._free: list[int] = []
        self._output_counts = self._zeros(0, torch.int32)
        self._in_prompt = self._zeros(0, torch.bool)

    def add(self, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int] = ()) -> int:
        """A slot with what a sequence has so far."""
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self._output_counts[slot] = 0
        self._in_prompt[slot] = False
        self._in_prompt[slot, torch.tensor(prompt_token_ids, dtype=torch.long, device=self._device)] = True
        for token_id in output_token_ids:
            self._output_counts[slot, token_id] += 1
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back; the tables go once nobody uses them."""
        self._free.append(slot)
        if len(self._free) == len(self._output_counts):
            self._free.clear()
            self._output_counts = self._zeros(0, torch.int32)
            self._in_prompt = self._zeros(0, torch.bool)

    def rows(self, rows: Sequence[int], slots: Sequence[int], params: Sequence[SamplingParams]) -> PenaltyRows:
        """What `penalize` needs for batch rows `rows`, whose sequences own `slots`."""

        def column(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32, device=self._device).unsqueeze(1)

        return PenaltyRows(
            rows=torch.tensor(rows, dtype=torch.long, device=self._device),
            slots=torch.tensor(slots, dtype=torch.long, device=self._device),
            repetition=column([param.repetition_penalty for param in params]),
            presence=column([param.presence_penalty for param in params]),
            frequency=column([param.frequency_penalty for param in params]),
        )

    def penalize(self, logits: torch.Tensor, batch: PenaltyRows) -> None:
        """Apply penalties in place to `logits` [num_sampled, vocab_size].

        Repetition (CTRL, arXiv:1909.05858) looks at prompt and output; presence and frequency at the output only.
        """
        counts = self._output_counts[batch.slots]  # [num_rows, vocab_size]
        in_output = counts > 0
        chosen = logits[batch.rows]
        repeated = torch.where(chosen > 0, chosen / batch.repetition, chosen * batch.repetition)
        penalized = torch.where(in_output | self._in_prompt[batch.slots], repeated, chosen)
        logits[batch.rows] = penalized - batch.frequency * counts - batch.presence * in_output

    def record(self, batch: PenaltyRows, token_ids: torch.Tensor) -> None:
        """Count one more output token per row; `token_ids` [num_sampled] covers the whole batch."""
        self._output_counts[batch.slots, token_ids[batch.rows]] += 1  # slots are distinct: no two writes collide

    def _grow(self) -> None:
        old = len(self._output_counts)
        new = max(_FIRST_CAPACITY, 2 * old)
        self._output_counts = torch.cat([self._output_counts, self._zeros(new - old, torch.int32)])
        self._in_prompt = torch.cat([self._in_prompt, self._zeros(new - old, torch.bool)])
        self._free.extend(reversed(range(old, new)))

    def _zeros(self, num_slots: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(num_slots, self._vocab_size, dtype=dtype, device=self._device)


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
