"""What several steps in flight bring to a pipeline: engines with one at a time and with one for each stage, in turn.

Both are up at once and the same but for that. Prints medians, and the median of the ratios of rounds. Run nothing else
meanwhile.

    python benchmarks/pipeline.py [--model smollm2-135m] [--dtype bfloat16] [--stages 2] [--rounds 5]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial

from shuteye import EngineConfig, SamplingParams
from shuteye.engine.core import EngineCore
from shuteye.executors import open_executor
from shuteye.tasks.base import RequestDelta
from shuteye.tasks.generate.requests import GenerateRequest

PROMPT_TOKENS = 64
NEW_TOKENS = 32
BATCHES = (1, 2, 4, 8, 16, 32)
LONG_PROMPT = 1024


class Pipeline:
    """An engine over a pipeline's ranks, stepped here."""

    def __init__(self, config: EngineConfig, *, in_flight: int | None) -> None:
        self._executor = open_executor(config)
        self._executor.max_in_flight = in_flight or self._executor.max_in_flight
        self._core = EngineCore(config, self._executor)
        self._names = itertools.count()

    def decode(self, batch: int) -> float:
        """Milliseconds from the first token of all to the last one, by the tokens that each of them got meanwhile."""
        counts = self._add(batch, PROMPT_TOKENS, NEW_TOKENS)
        while min(counts.values()) == 0:
            self._step(counts)
        begun, before = time.perf_counter(), sum(counts.values())
        self._run(counts)
        return (time.perf_counter() - begun) * 1e3 / (sum(counts.values()) - before) * batch

    def first_token(self, num_tokens: int) -> float:
        """Milliseconds until a prompt of that length has its first token."""
        counts = self._add(1, num_tokens, 1)
        begun = time.perf_counter()
        self._run(counts)
        return (time.perf_counter() - begun) * 1e3

    def close(self) -> None:
        self._executor.close()

    def _add(self, batch: int, num_tokens: int, max_tokens: int) -> dict[str, int]:
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        names = [f"request-{next(self._names)}" for _ in range(batch)]
        for index, name in enumerate(names):
            prompt = tuple(1000 + (index + 7 * at) % 40_000 for at in range(num_tokens))
            self._core.add(GenerateRequest(name, prompt, params))
        return dict.fromkeys(names, 0)

    def _step(self, counts: dict[str, int]) -> None:
        for delta in self._core.step():
            assert isinstance(delta, RequestDelta), "a model that generates answers with tokens"
            assert delta.error is None, delta.error
            counts[delta.request_id] += len(delta.token_ids)

    def _run(self, counts: dict[str, int]) -> None:
        while self._core.can_step:
            self._step(counts)


def compare(what: str, one: Pipeline, several: Pipeline, measure: Callable[[Pipeline], float], rounds: int) -> None:
    """Print the medians of both, in turn, and of their ratios."""
    measure(one), measure(several)
    pairs = []
    for number in range(rounds):
        order = (one, several) if number % 2 == 0 else (several, one)
        found = {id(pipeline): measure(pipeline) for pipeline in order}
        pairs.append((found[id(one)], found[id(several)]))
    first, second = (statistics.median(column) for column in zip(*pairs, strict=True))
    gains = sorted(one_ms / several_ms for one_ms, several_ms in pairs)
    print(
        f"| {what} | {first:.1f} ms | {second:.1f} ms | {statistics.median(gains):.2f} "
        f"({gains[0]:.2f} to {gains[-1]:.2f}) |",
        flush=True,
    )


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    config = EngineConfig(
        arguments.model,
        dtype=arguments.dtype,
        pipeline_parallel_size=arguments.stages,
        kv_cache_memory=256 << 20,
        enable_prefix_caching=False,
    )
    one, several = (Pipeline(config, in_flight=in_flight) for in_flight in (1, None))
    try:
        print(f"| {arguments.model} {arguments.dtype}, PP {arguments.stages} | one | {arguments.stages} | gain |")
        print("|---|---|---|---|")
        cases = {f"decode x{batch}, a token each": partial(Pipeline.decode, batch=batch) for batch in BATCHES}
        cases[f"first token of {LONG_PROMPT}"] = partial(Pipeline.first_token, num_tokens=LONG_PROMPT)
        for what, measure in cases.items():
            compare(what, one, several, measure, arguments.rounds)
    finally:
        for pipeline in (one, several):
            pipeline.close()


if __name__ == "__main__":
    main()
