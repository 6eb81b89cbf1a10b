"""Two engines up at once, asked in turn: for differences that are smaller than this machine's moods.

The engine that is not asked is idle; one that spins while idle spoils the other's figures, so --pause lets it settle.

    python benchmarks/side_by_side.py shuteye shuteye-plain     what does sleep mode cost while awake?
    python benchmarks/side_by_side.py shuteye vllm --pause 0.5
    SHUTEYE_BEFORE=../before python benchmarks/side_by_side.py shuteye shuteye-before      what did a change cost?
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from checkpoints import FORMATS, LOGS, MODELS, Checkpoint, prepare
from machine import LEVELS, this_machine
from peers import ENGINES
from peers.base import Burst, Engine, EngineFailure, SelfTimed
from peers.llama_cpp import program
from peers.process import ending_engines
from peers.shuteye import Shuteye, before
from prompts import Prompts
from rounds import ASK_TIMEOUT_S, PROMPT_TOKENS

NEW_TOKENS = 64
CHOICES = {name: engine for name, engine in ENGINES.items() if name != "llama-bench"} | {"shuteye-before": before}


def main() -> None:
    arguments = parse()
    checkpoint = prepare(arguments.model, arguments.format, quantize=program("llama-quantize"))
    names = (arguments.first, arguments.second)
    engines = [asked(name, checkpoint, arguments) for name in names]
    for engine in engines:
        if missing := engine.missing():
            sys.exit(missing)
    try:
        for engine in engines:
            engine.prepare()
        prompts = Prompts(checkpoint.tokenizer, "side by side")
        for engine in engines:
            engine.start(prompts.write(32))
        print(
            f"{arguments.first} and {arguments.second}, {arguments.model}, {arguments.format}, {arguments.rounds} pairs"
        )
        print(this_machine(level=arguments.level, measured=False).words)
        for title, measure in measures(sleep_too=all(isinstance(engine, Shuteye) for engine in engines)).items():
            show(title, pairs(engines, prompts, measure, arguments))
    except EngineFailure as failure:
        sys.exit(str(failure))
    finally:
        for engine in engines:
            engine.stop()


def asked(name: str, checkpoint: Checkpoint, arguments: argparse.Namespace) -> Engine:
    engine = CHOICES[name](checkpoint, arguments.logs / name, arguments.level)
    assert not isinstance(engine, SelfTimed), "it is no choice"
    return engine


def measures(*, sleep_too: bool) -> dict[str, Callable[[Engine, Prompts], float]]:
    """What is asked → a figure of which more is better."""

    def ask(engine: Engine, prompts: Prompts, streams: int, length: int, new_tokens: int) -> Burst:
        return engine.ask(prompts.several(streams, length), max_tokens=new_tokens, timeout_s=ASK_TIMEOUT_S)

    def first_token(length: int) -> Callable[[Engine, Prompts], float]:
        return lambda engine, prompts: 1 / ask(engine, prompts, 1, length, 1).first_token_s

    def decode(streams: int) -> Callable[[Engine, Prompts], float]:
        return lambda engine, prompts: ask(engine, prompts, streams, PROMPT_TOKENS, NEW_TOKENS).decode_rate

    def sleep(engine: Engine, prompts: Prompts) -> float:
        seconds = engine.sleep()
        assert seconds is not None, "the engine sleeps when it is told to"
        first_token(32)(engine, prompts)
        return 1 / seconds

    def wake(engine: Engine, prompts: Prompts) -> float:
        engine.sleep()
        return first_token(32)(engine, prompts)

    found: dict[str, Callable[[Engine, Prompts], float]] = {}
    if sleep_too:
        found = {"sleep calls, 1/s": sleep, "first tokens of 32-token prompts after a sleep, 1/s": wake}
    found |= {f"first tokens of {length}-token prompts, 1/s": first_token(length) for length in (32, 512, 2048)}
    return found | {f"decode, {streams} streams, tok/s": decode(streams) for streams in (1, 8, 16)}


def pairs(
    engines: list[Engine], prompts: Prompts, measure: Callable[[Engine, Prompts], float], arguments: argparse.Namespace
) -> list[tuple[float, float]]:
    """One figure of each engine per pair; who goes first alternates; the first pair is not counted."""
    found = []
    for index in range(arguments.rounds + 1):
        figures = {}
        for turn in (index % 2, 1 - index % 2):
            time.sleep(arguments.pause)
            figures[turn] = measure(engines[turn], prompts)
        found.append((figures[0], figures[1]))
    return found[1:]


def show(title: str, found: list[tuple[float, float]]) -> None:
    first, second = (statistics.median(column) for column in zip(*found, strict=True))
    low, middle, high = statistics.quantiles((one / other for one, other in found), n=4)
    print(
        f"{title}: {first:.4g} and {second:.4g}; ratio of pairs {middle:.3f}, half of them {low:.2f} to {high:.2f}",
        flush=True,
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", choices=sorted(CHOICES))
    parser.add_argument("second", choices=sorted(CHOICES))
    parser.add_argument("--model", choices=MODELS, default="smollm2", help="default smollm2")
    parser.add_argument("--format", choices=FORMATS, default="bf16", help="of the weights; default bf16")
    parser.add_argument("--level", choices=LEVELS, help="hold both to this instruction set")
    parser.add_argument("--rounds", type=int, default=12, help="pairs of each measure; default 12")
    parser.add_argument(
        "--pause", type=float, default=0.1, metavar="S", help="seconds before each request; default 0.1"
    )
    parser.add_argument("--logs", type=Path, default=LOGS, metavar="DIR", help="where engines' output goes")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds: quartiles need at least 2 pairs")
    return arguments


if __name__ == "__main__":
    ending_engines(main)
