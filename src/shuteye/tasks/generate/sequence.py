"""One request as the scheduler has it on its way: its tokens, its blocks, and how far it is.

Knows nothing of other requests, nor of when it runs. No torch.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from shuteye.cache.prefix import HashChain
from shuteye.state import Epoch
from shuteye.tasks.base import ActiveRequest
from shuteye.tasks.generate.plans import Scoring
from shuteye.tasks.generate.requests import GenerateRequest

MAX_SCORED_CHUNK = 256
"""Prompt tokens computed in one step if their logits are wanted, each of which is as wide as the vocabulary."""


@dataclass(slots=True, eq=False)
class ActiveSequence(ActiveRequest):
    """A request on its way: waiting if it has no place in the batch, running otherwise.

    Attributes:
        token_ids: prompt, then output; it only grows, also across preemptions.
        max_length: prompt plus output at which it finishes with "length".
        block_ids: the block table, covering at least [0, num_computed); empty while waiting.
        num_cached: prompt tokens found in the prefix cache when first scheduled; None before that.
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
    num_cached: int | None = None
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
        """Known tokens that have no K/V yet."""
        return len(self.token_ids) - self.num_computed
