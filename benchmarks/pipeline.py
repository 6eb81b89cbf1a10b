"""Would several plans in flight make a pipeline faster? Steps posted one at a time, and as many at once as stages.

Asks the ranks of PP 2 directly, past the engine, which has one plan in flight. Run nothing else meanwhile.

    python benchmarks/pipeline.py [--model smollm2-135m] [--dtype bfloat16] [--rounds 5]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace

from shuteye import EngineConfig, SamplingParams
from shuteye.executors import open_executor
from shuteye.executors.frames import ask
from shuteye.executors.multiproc import MultiprocExecutor
from shuteye.tasks.generate.plans import Admission, Chunk, StepPlan

STAGES = 2
BLOCK_SIZE = 16
CONTEXT = 256
STEPS = 24
GREEDY = SamplingParams(temperature=0.0, max_tokens=STEPS, ignore_eos=True)


class Ranks:
    """The ranks of a pipeline, asked past the executor's one call at a time."""

    def __init__(self, executor: MultiprocExecutor, *, num_blocks: int) -> None:
        executor.call("allocate_kv_cache", num_blocks)
        self._executor = executor
        self._epoch = tuple(executor.call("epoch"))
        self._ids = itertools.count(1 << 40)

    def post(self, plan: StepPlan) -> int:
        call_id = next(self._ids)
        frame = ask(call_id, "execute", (replace(plan, epoch=self._epoch),))
        for rank in self._executor._processes.values():
            rank.post(frame)
        return call_id

    def run(self, plans: Iterable[StepPlan], *, in_flight: int) -> float:
        """Seconds until all are done, with so many posted at a time, in order."""
        begun = time.perf_counter()
        posted: deque[int] = deque()
        for plan in plans:
            if len(posted) == in_flight:
                self._await(posted.popleft())
            posted.append(self.post(plan))
        while posted:
            self._await(posted.popleft())
        return time.perf_counter() - begun

    def _await(self, call_id: int) -> None:
        """Every rank answers in the order in which it was asked."""
        for rank in self._executor._processes.values():
            while (reply := rank.received()) is None:
                rank.socket.poll(1000)
            assert reply.call_id == call_id, "an answer to something else"
            assert reply.error is None, reply.error


class Sequences:
    """Sequences with blocks of their own, and the plans of their steps."""

    def __init__(self, count: int, *, length: int) -> None:
        self._blocks_each = -(-(length + STEPS) // BLOCK_SIZE)
        self._length = length
        self.names = [f"sequence-{index}-of-{count}-{length}" for index in range(count)]

    @property
    def num_blocks(self) -> int:
        return 1 + self._blocks_each * len(self.names)

    def admit(self, *, chunk: int) -> list[StepPlan]:
        """The plans of their prompts, `chunk` tokens a step; nothing is sampled."""
        plans = []
        for index, name in enumerate(self.names):
            for start in range(0, self._length, chunk):
                tokens = tuple(1000 + at % 40_000 for at in range(start, start + chunk))
                first = (Admission(name, GREEDY, tokens),) if start == 0 else ()
                plans.append(StepPlan((self._chunk(index, tokens, start, sample=False),), first))
        return plans

    def forget(self) -> StepPlan:
        """Their samplers' state can go; the step itself computes one token of the first."""
        return StepPlan((self._chunk(0, (7,), 0, sample=False),), forget=tuple(self.names))

    def decode(self, step: int, indices: Sequence[int]) -> StepPlan:
        """One token of each of these."""
        return StepPlan(tuple(self._chunk(index, (7,), self._length + step, sample=True) for index in indices))

    def _chunk(self, index: int, tokens: tuple[int, ...], start: int, *, sample: bool) -> Chunk:
        end = start + len(tokens)
        first = 1 + index * self._blocks_each
        return Chunk(self.names[index], tokens, start, tuple(range(first, first + -(-end // BLOCK_SIZE))), sample)


def decode(ranks: Ranks, batch: int, rounds: int) -> None:
    """Print the time of a decode step of `batch` sequences: whole, and in as many parts as there are stages."""
    sequences = Sequences(batch, length=CONTEXT)
    ranks.run(sequences.admit(chunk=CONTEXT), in_flight=1)
    whole = [sequences.decode(step, range(batch)) for step in range(STEPS)]
    parts = [
        sequences.decode(step, range(part * batch // STAGES, (part + 1) * batch // STAGES))
        for step in range(STEPS)
        for part in range(STAGES)
    ]
    pairs = [(ranks.run(whole, in_flight=1), ranks.run(parts, in_flight=STAGES)) for _ in range(rounds)]
    ranks.run([sequences.forget()], in_flight=1)
    _print(f"decode x{batch}, a step", [(one / STEPS, other / STEPS) for one, other in pairs])


def prefill(ranks: Ranks, length: int, chunk: int, rounds: int) -> None:
    """Print the time of a prompt in chunks: one chunk at a time, and the next begun as soon as a stage is free."""
    pairs = []
    for _ in range(rounds):
        sequences = Sequences(1, length=length)
        found = []
        for in_flight in (1, STAGES):
            found.append(ranks.run(sequences.admit(chunk=chunk), in_flight=in_flight))
            ranks.run([sequences.forget()], in_flight=1)
        pairs.append((found[0], found[1]))
    _print(f"a prompt of {length} in chunks of {chunk}", pairs)


def _print(what: str, pairs: list[tuple[float, float]]) -> None:
    one, several = (statistics.median(column) * 1e3 for column in zip(*pairs, strict=True))
    gain = statistics.median(first / second for first, second in pairs)
    print(f"| {what} | {one:.1f} ms | {several:.1f} ms | {gain:.2f} |", flush=True)


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    config = EngineConfig(arguments.model, dtype=arguments.dtype, pipeline_parallel_size=STAGES)
    executor = open_executor(config)
    assert isinstance(executor, MultiprocExecutor)
    try:
        ranks = Ranks(executor, num_blocks=Sequences(32, length=CONTEXT).num_blocks)
        print(f"| {arguments.model} {arguments.dtype}, PP {STAGES} | one in flight | {STAGES} in flight | gain |")
        print("|---|---|---|---|")
        for batch in (2, 8, 16, 32):
            decode(ranks, batch, arguments.rounds)
        for chunk in (256, 128):
            prefill(ranks, 1024, chunk, arguments.rounds)
    finally:
        executor.close()


if __name__ == "__main__":
    main()
