"""A request that generates, on its way: its tokens, which of them are computed or planned, and its share of a plan.

Knows nothing of other requests, or of which blocks are free. No torch.

Where stages of a pipeline compute different plans at once, several plans are in flight:

    tokens   [0 ........ num_computed) [num_computed ..... num_planned) [num_planned ........ len(token_ids))
              in the KV cache           in plans in flight               to be planned
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from shuteye.cache.blocks import HashChain
from shuteye.state import Epoch
from shuteye.tasks.base import ActiveRequest
from shuteye.tasks.generate.plans import Admission, Chunk, Scoring
from shuteye.tasks.generate.requests import GenerateRequest


@dataclass(slots=True, eq=False)
class ActiveSequence(ActiveRequest):
    """A request on its way: waiting if it has no place in the batch, running otherwise.

    Attributes:
        token_ids: prompt, then output; it only grows, also across preemptions.
        max_length: prompt plus output at which it finishes with "length".
        block_ids: the block table, covering at least [0, num_planned); empty while waiting.
        num_computed: tokens that have K/V.
        num_planned: tokens that have K/V, or will have once the plans in flight have come back.
        stint: how often it has given up its blocks; plans in flight from before then are no longer about it.
        num_cached: prompt tokens found in the prefix cache when first scheduled; None before that.
        num_preemptions: how often it lost its blocks and was computed again.
        admitted: a worker knows it.
        epoch: in which its blocks were taken; only then do they hold its K/V.
        scored: log-probabilities of the prompt's tokens are wanted.
        num_scored: how many positions of the prompt have told what follows them.
        max_chunk: most tokens computed in one step.
    """

    request: GenerateRequest
    token_ids: list[int]
    hashes: HashChain
    stop_token_ids: frozenset[int]
    max_length: int
    block_ids: tuple[int, ...] = ()
    num_computed: int = 0
    num_planned: int = 0
    stint: int = 0
    num_cached: int | None = None
    num_preemptions: int = 0
    admitted: bool = False
    running: bool = False
    epoch: Epoch = ()
    scored: bool = False
    num_scored: int = 0
    max_chunk: int = sys.maxsize

    @property
    def has_grammar(self) -> bool:
        """Whether its output has a structure, which allows an eos only where it may end."""
        return self.request.params.structured_outputs is not None

    @property
    def to_be_scored(self) -> bool:
        """Whether some of the prompt has yet to tell how likely it was."""
        return self.scored and self.num_scored < self.num_prompt - 1

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt

    def scoring(self, start: int, end: int) -> Scoring | None:
        """What is yet to be told of positions [start, end)."""
        params = self.request.params
        first, last = max(start, self.num_scored), min(end, self.num_prompt - 1)
        targets = self.request.prompt_token_ids[first + 1 : last + 1]
        return Scoring(first - start, targets, params.prompt_logprobs or 0) if targets else None

    @property
    def num_missing(self) -> int:
        """Known tokens that have no K/V yet, and are in no plan."""
        return len(self.token_ids) - self.num_planned

    @property
    def is_in_flight(self) -> bool:
        """Whether a plan that computes some of it has not come back."""
        return self.num_computed < self.num_planned


@dataclass(frozen=True, slots=True)
class Part:
    """A sequence's share of a plan, and at which `stint` it was planned."""

    sequence: ActiveSequence
    chunk: Chunk
    stint: int

    @property
    def request_id(self) -> str:
        """Of the sequence, when it was planned."""
        return self.chunk.request_id

    @property
    def counts(self) -> bool:
        """False if the sequence was aborted or preempted after it was planned."""
        return self.sequence.stint == self.stint


@dataclass(slots=True)
class Batch:
    """A plan in the making.

    Attributes:
        budget: how many more tokens it may compute.
        places: of how many more running sequences it may sample.
    """

    budget: int
    places: int
    parts: list[Part] = field(default_factory=list)
    admissions: list[Admission] = field(default_factory=list)
