"""A checkpoint loaded onto several ranks, which are threads, and greedy steps over them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from thread_group import on_all_ranks

from shuteye.tasks.generate.plans import Chunk, StepPlan
from shuteye.tasks.generate.runner import PackedBatch

BLOCK_SIZE = 16

NINE_ON_THREE: dict[str, Any] = {
    "hidden_size": 72,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "num_layers": 3,
    "vocab_size": 321,
}
LAYOUTS = {"TP 2": (2, 1), "TP 3": (3, 1), "PP 2": (1, 2), "PP 3": (1, 3), "TP 2 × PP 2": (2, 2)}
PROMPTS = [list(range(7, 47)), [5, 300, 9], [11]]


@dataclass
class Ranks:
    """A driver for each rank, stepped together."""

    drivers: list[Any]
    groups: list[Any]

    @property
    def plans(self):
        return [driver.model.shard for driver in self.drivers]

    def forward(self, batch: PackedBatch) -> list[torch.Tensor]:
        """What each rank computed."""
        computed = [lambda each=each: each.model.forward(batch, each.kv_cache) for each in self.drivers]
        return [torch.from_numpy(found) for found in on_all_ranks(computed)]

    def logits(self, batch: PackedBatch) -> torch.Tensor:
        (found,) = (each for each, plan in zip(self.forward(batch), self.plans, strict=True) if plan.holds_sampler)
        return found


def batches(steps: list[list[Chunk]]) -> list[PackedBatch]:
    return [PackedBatch.from_plan(StepPlan(tuple(step)), block_size=BLOCK_SIZE) for step in steps]


def greedy(forward, num_tokens: int, *, prompts=PROMPTS) -> tuple[list[list[int]], torch.Tensor]:
    """Greedy continuations of three prompts in one batch, the first prefilled in two chunks; all logits on the way."""
    tables = [(3, 1, 5, 4), (2, 6), (7,)]
    tokens = [list(prompt) for prompt in prompts]
    first = Chunk("0", tuple(tokens[0][:21]), 0, tables[0], False)  # a step that samples nothing
    (batch,) = batches([[first]])
    assert forward(batch).shape[0] == 0
    computed, logits = [21, 0, 0], []
    for _ in range(num_tokens):
        chunks = [
            Chunk(str(index), tuple(ids[done:]), done, tables[index], True)
            for index, (ids, done) in enumerate(zip(tokens, computed, strict=True))
        ]
        (batch,) = batches([chunks])
        found = forward(batch)
        logits.append(found)
        computed = [len(ids) for ids in tokens]
        for ids, row in zip(tokens, found, strict=True):
            ids.append(int(row.argmax()))
    return [ids[len(prompt) :] for ids, prompt in zip(tokens, prompts, strict=True)], torch.cat(logits)
