"""What dividing a model among ranks costs: layouts up at once, asked in turn, beside one rank with all threads.

Prints medians, and medians of the ratios to one rank in the same round. Run nothing else meanwhile.

    python benchmarks/ranks.py [--model smollm2-135m] [--dtype float32] [--rounds 10] [--layouts tp2 pp2]
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from shuteye import LLM, EngineConfig, SamplingParams
from shuteye.executors import open_executor

MIB = 1 << 20
KV_BYTES = 256 * MIB
PROMPT = list(range(1000, 1032))
LONG_PROMPT = [1000 + 7 * index % 40_000 for index in range(512)]
TOKENS = 48
LAYOUTS = {"one rank": (1, 1), "tp2": (2, 1), "pp2": (1, 2), "tp2pp2": (2, 2)}
BASE = "one rank"


@dataclass
class Layout:
    """A running engine, and what was measured of it."""

    name: str
    llm: LLM
    samples: dict[str, list[float]] = field(default_factory=dict)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.samples.setdefault(what, []).append((time.perf_counter() - begun) * 1e3)

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[tuple[int, ...]]:
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        return [tuple(answer.outputs[0].token_ids) for answer in self.llm.generate(prompts, params)]

    def measure(self) -> list[tuple[int, ...]]:
        """One round of everything; the tokens after a sleep are to be those before it."""
        with self.timed(f"decode x1, {TOKENS} tokens"):
            before = self.generate([PROMPT], TOKENS)
        batch = [[*PROMPT, index] for index in range(8)]
        with self.timed(f"decode x8, {TOKENS} tokens each"):
            self.generate(batch, TOKENS)
        self.llm.reset_prefix_cache()
        with self.timed("first token of 512"):
            self.generate([LONG_PROMPT], 1)
        with self.timed("sleep"):
            self.llm.sleep(1)
        with self.timed("wake"):
            self.llm.wake_up()
        after = self.generate([PROMPT], TOKENS)
        assert after == before, f"{self.name}: other tokens after a wake"
        return before

    def resident(self) -> list[float]:
        """MiB of each rank's process that no other process has: private, and its share of what is shared (Pss)."""
        return [_pss(rank.pid) / MIB for rank in self.llm.state.ranks]


def _pss(pid: int) -> int:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    found = re.search(r"^Pss: +(\d+) kB$", rollup, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def compare(model: str, dtype: str, names: list[str], rounds: int) -> None:
    """Bring all layouts up, and let each do every round."""
    with ExitStack() as stack:
        layouts = [_open(name, model, dtype, stack) for name in [BASE, *names]]
        for layout in layouts:  # pages are touched, and kernels warm
            layout.measure()
            layout.samples.clear()
        for number in range(rounds):
            turned = layouts[number % len(layouts) :] + layouts[: number % len(layouts)]
            answers = {layout.name: layout.measure() for layout in turned}
        if dtype == "float32":
            assert len({str(answer) for answer in answers.values()}) == 1, f"the layouts disagree: {answers}"
        _print(layouts)
        for layout in layouts:
            awake = layout.resident()
            layout.llm.sleep(1)
            asleep = layout.resident()
            print(f"{layout.name}: MiB a rank, awake {_listed(awake)}, asleep {_listed(asleep)}")


def _listed(values: list[float]) -> str:
    return " + ".join(f"{value:.0f}" for value in values)


def _open(name: str, model: str, dtype: str, stack: ExitStack) -> Layout:
    llm = LLM(model, **_options(name, dtype))
    stack.callback(llm.close)
    return Layout(name, llm)


def _options(name: str, dtype: str) -> dict[str, object]:
    tp_size, pp_size = LAYOUTS[name]
    return {
        "dtype": dtype,
        "enable_sleep_mode": True,
        "kv_cache_memory": KV_BYTES,
        "tensor_parallel_size": tp_size,
        "pipeline_parallel_size": pp_size,
    }


def _print(layouts: list[Layout]) -> None:
    base, *others = layouts
    print("| ms, median (ratio to one rank) | " + " | ".join(layout.name for layout in layouts) + " |")
    print("|---|" + "---|" * len(layouts))
    for what, ours in base.samples.items():
        cells = [f"{statistics.median(ours):.1f}"]
        for layout in others:
            theirs = layout.samples[what]
            ratio = statistics.median(one / two for one, two in zip(theirs, ours, strict=True))
            cells.append(f"{statistics.median(theirs):.1f} ({ratio:.2f})")
        print(f"| {what} | " + " | ".join(cells) + " |")


def round_trip(model: str, dtype: str, name: str) -> None:
    """Print what asking all ranks and gathering their answers takes, with nothing to do in between."""
    executor = open_executor(EngineConfig(model, **_options(name, dtype)))  # type: ignore[arg-type]
    try:
        took = sorted(_times(lambda: executor.call("weights_source"), 1000))
        low, middle, high = took[0], took[len(took) // 2], took[len(took) * 9 // 10]
        print(f"{name}: asking {executor.num_ranks} ranks and gathering: {low:.0f} / {middle:.0f} / {high:.0f} µs")
    finally:
        executor.close()


def _times(call: Callable[[], object], rounds: int) -> Iterator[float]:
    for _ in range(rounds):
        begun = time.perf_counter()
        call()
        yield (time.perf_counter() - begun) * 1e6


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS)[1:], default=list(LAYOUTS)[1:])
    arguments = parser.parse_args()
    compare(arguments.model, arguments.dtype, arguments.layouts, arguments.rounds)
    for name in arguments.layouts:
        round_trip(arguments.model, arguments.dtype, name)


if __name__ == "__main__":
    main()
