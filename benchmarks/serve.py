"""shuteye beside other engines on this machine's CPU: the same checkpoint, the same requests, engine after engine.

Starts each engine in turn, round after round (A B C, A B C, …), sends the same streamed completions to each, and prints
medians with minimum–maximum and how many times as good shuteye is. Run nothing else meanwhile.

    make bench-peers                                      install llama.cpp, OpenVINO GenAI, transformers serve, vLLM
    python benchmarks/serve.py --quick                    one short round of everything: does it all work?
    python benchmarks/serve.py --docs                     SmolLM2-135M; writes docs/benchmarks.md and its picture
    python benchmarks/serve.py --model llama-1b --docs    1.1 billion parameters, 2.2 GB; adds its section
    python benchmarks/serve.py --format q8_0 --docs       quantized weights, from the GGUF file that llama.cpp serves
    python benchmarks/serve.py --level avx2 --docs        every engine held to an instruction set
    python benchmarks/side_by_side.py shuteye shuteye-plain    what does sleep mode cost while awake?

Engines that are not installed become rows that say how to install them; so does whatever fails or hangs. Logs of the
engines are kept. Ctrl-C ends the engine that runs, and nothing is left behind. What each figure means is in
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path

import picture
import rounds
from checkpoints import FORMATS, LOGS, MODELS, prepare
from machine import LEVELS, this_machine
from peers import ENGINES, QUANTIZED_ENGINES
from peers.llama_cpp import program
from peers.process import ending_engines
from prompts import Prompts
from report import Report, headline, lines, page
from scores import ScoreReport

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SCORES = RESULTS / "perplexity"
"""What perplexity.py has kept, one file for each machine."""
PAGE, PICTURE, README = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "benchmarks.svg", ROOT / "README.md"
HEADLINE = re.compile(r"(<!-- beside others: begin -->\n).*?(<!-- beside others: end -->)", re.DOTALL)
ROUNDS = {"smollm2": 4, "llama-1b": 2}
"""About twenty minutes with all peers."""
MOST_TURNS = {"vllm": 2}
"""vLLM takes a minute or two to start: it takes part in the first rounds only."""


def main() -> None:
    arguments = parse()
    if arguments.render:
        write_docs()
        return
    report = run(arguments)
    print("\n".join(lines(report)))
    if arguments.json:
        arguments.json.write_text(json.dumps(report.as_dict(), indent=1))
    if arguments.docs:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{report.key}.json").write_text(json.dumps(report.as_dict(), indent=1) + "\n")
        write_docs()


def run(arguments: argparse.Namespace) -> Report:
    """All rounds, on the checkpoint made for them."""
    machine = this_machine(level=arguments.level, measured=not arguments.quick)
    rounds.to_stderr(machine.words)
    checkpoint = prepare(arguments.model, arguments.format, quantize=program("llama-quantize"))
    number = 1 if arguments.quick else arguments.rounds or ROUNDS[arguments.model]
    plan = rounds.QUICK if arguments.quick else rounds.PLANS[arguments.model]
    results = rounds.measure(
        {name: ENGINES[name](checkpoint, arguments.logs, arguments.level) for name in arguments.engines},
        rounds=number,
        most_turns=MOST_TURNS,
        plan=plan,
        prompts=lambda seed: Prompts(checkpoint.tokenizer, seed),
        say=rounds.to_stderr,
    )
    settings = f"{number} round{'s' if number > 1 else ''}, {plan.new_tokens} new tokens per stream"
    made = "" if arguments.format == "bf16" else f", then {FORMATS[arguments.format].title} by llama-quantize"
    return Report(
        model=arguments.model,
        format=arguments.format,
        description=MODELS[arguments.model] + made,
        date=time.strftime("%Y-%m-%d"),
        machine=machine,
        settings=f"{settings}{' (--quick: a trial, not a measurement)' if arguments.quick else ''}",
        results=tuple(results),
    )


def read_reports() -> list[Report]:
    """What `--docs` has kept: by processor, then in the order of `MODELS` and `FORMATS`."""
    kept = [Report.from_dict(json.loads(path.read_text())) for path in sorted(RESULTS.glob("*.json"))]
    models, forms = list(MODELS), list(FORMATS)
    return sorted(kept, key=lambda each: (each.machine.key, models.index(each.model), forms.index(each.format)))


def read_scores() -> list[ScoreReport]:
    """What perplexity.py has kept, by processor."""
    return [ScoreReport.from_dict(json.loads(path.read_text())) for path in sorted(SCORES.glob("*.json"))]


def write_docs() -> None:
    """docs/benchmarks.md of all that was measured so far, its picture, and what the README says of it."""
    reports = read_reports()
    PAGE.write_text(page(reports, read_scores()))
    PICTURE.write_text(picture.draw(reports))
    README.write_text(with_headline(README.read_text(), reports))
    rounds.to_stderr(f"Wrote {', '.join(str(path.relative_to(ROOT)) for path in (PAGE, PICTURE, README))}.")


def with_headline(readme: str, reports: Sequence[Report]) -> str:
    """The README with its table of ratios as the results say."""
    return HEADLINE.sub(lambda found: found[1] + headline(reports) + found[2], readme)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--engines",
        type=engine_names,
        metavar="A,B,…",
        help=f"which, in the order of their turns; default all: {','.join(ENGINES)} "
        f"(shuteye-plain is shuteye with sleep mode off), of quantized weights {','.join(QUANTIZED_ENGINES)}",
    )
    parser.add_argument("--model", choices=MODELS, default="smollm2", help="default smollm2; checkpoints are made once")
    parser.add_argument("--format", choices=FORMATS, default="bf16", help="of the weights; default bf16")
    parser.add_argument(
        "--level", choices=LEVELS, help="hold every engine to this instruction set, and keep its figures apart"
    )
    counts = ", ".join(f"{count} on {model}" for model, count in ROUNDS.items())
    parser.add_argument("--rounds", type=int, help=f"turns of each engine; default {counts}; vLLM has at most 2")
    parser.add_argument("--quick", action="store_true", help="one round with short answers: a trial, not a measurement")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample to this file")
    parser.add_argument("--docs", action="store_true", help="write docs/benchmarks.md and docs/benchmarks.svg")
    parser.add_argument("--render", action="store_true", help="measure nothing; write both from what --docs kept")
    parser.add_argument("--logs", type=Path, default=LOGS, metavar="DIR", help=f"where engines' output goes: {LOGS}")
    arguments = parser.parse_args(argv)
    arguments.engines = arguments.engines or list(ENGINES if arguments.format == "bf16" else QUANTIZED_ENGINES)
    return arguments


def engine_names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in ENGINES]:
        raise argparse.ArgumentTypeError(f"no engine {', '.join(unknown)}; there are {', '.join(ENGINES)}")
    return names


if __name__ == "__main__":
    ending_engines(main)
