"""Results of serve.py as lines for a terminal, as JSON, and as docs/benchmarks.md.

Knows nothing of how anything was measured; the words that say it are here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import targets
from checkpoints import FORMATS
from machine import Machine
from rounds import METRICS, WAKING, Metric, Results, best_peer, ratios
from scored_files import SCORED
from scores import MOST_PERCENT, ScoreReport, Scores

TITLES = {
    "shuteye": "shuteye",
    "shuteye-plain": "shuteye, sleep mode off",
    "llama.cpp": "llama.cpp server",
    "llama-bench": "llama-bench (in process)",
    "openvino": "OpenVINO GenAI (in process)",
    "transformers": "transformers serve",
    "vllm": "vLLM on CPU",
}
OWN = ("shuteye", "shuteye-plain")
NO_RATIO = "–"
HEADLINE = {
    "decode_1": "decode ×1",
    "decode_8": "×8",
    "decode_16": "×16",
    "ttft_512": "first token of 512",
    "start": "start",
    "memory_awake": "memory",
    "wake": "wake",
}
"""What the README says of, and in which words."""

DEFINITIONS = """\
Every engine serves the same checkpoint on all cores, and gets the same requests: `/v1/completions`, streamed,
temperature 0, a fixed number of tokens whatever the model would rather say. Every prompt is new, so that no cache of
prompts helps anyone, and is checked to be as many tokens for the engine as for us, as is the answer. OpenVINO GenAI has
no server here; it runs in a process of its own and pays for no HTTP. Engines take turns: in each round each is started,
measured and ended.

Weights are bfloat16 for everyone, or quantized: then llama.cpp and shuteye serve one and the same GGUF file, which
llama.cpp's own `llama-quantize` made, and OpenVINO what its NNCF makes of the same weights, int8 by rows or int4 in
groups of 64. llama.cpp is compiled for the processor it runs on. `llama-bench` is its own benchmark: one stream without
sampling or server, 128 tokens from an empty context; its prompt rates are shown as the time of such a prompt.

There is a section for each processor and instruction set; each keeps its figures, with their date, until it is measured
again there. Memory is read, and products are computed, by `benchmarks/peaks.cpp`, before the first round.

- **Start of the process to first token**: from spawning it, with the checkpoint's files in the page cache, to the first
  token of a 32-token prompt; the request is repeated until the server takes it.
- **First token**: from sending one request, with nothing else running, to its first piece of text.
- **Decode, N streams**: N prompts of 200 tokens sent at once; tokens of all streams per second, from the moment when
  every stream had its first token to the last token. This is the figure that claims are about.
- **End to end, N streams**: the same requests; all generated tokens over the whole time, prompts included.
- **Memory**: proportional set size of the process and its descendants, right after 16 streams have ended; and asleep.
  Everyone has a KV cache for 16 streams of 2,560 tokens, in 16 bits (OpenVINO on a processor without bfloat16: in 8);
  shuteye's costs memory as it fills, most others' at once.
- **Weights on disk**: the files that the engine runs from: an image, a GGUF file, or what its tools made.
- **Sleep**: how long it took until it said so. llama.cpp goes to sleep by itself after idle seconds.
- **Wake to first token**: from sending a 32-token request to a sleeping engine to its first token; the request wakes it
  (vLLM is told to wake first).
"""
PERPLEXITY = """\
`benchmarks/perplexity.py` scores the prose of mpmath's documentation, 20,480 tokens in windows of 512, with
SmolLM2-135M-Instruct: shuteye from the file that it serves, transformers in float32 on the weights that the file stands
for. llama.cpp (`llama-perplexity`) scores the second half of each window; its difference is from transformers on the
same tokens. The last three columns are how far apart log-probabilities of these tokens are (root mean square):
shuteye's and llama.cpp's from transformers', which is the rounding of activations to 16 or 8 bits, and from each other.
"""


@dataclass(frozen=True, slots=True)
class Report:
    """One run on one model in one format, on one machine.

    Attributes:
        model: its key in `checkpoints.MODELS`; `description` is for people.
        format: its key in `checkpoints.FORMATS`.
        settings: how the run was done, in words.
    """

    model: str
    format: str
    description: str
    date: str
    machine: Machine
    settings: str
    results: tuple[Results, ...]

    @property
    def key(self) -> str:
        """Its file's name: what was measured, and where."""
        return f"{self.model}-{self.format}-{self.machine.key}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Report:
        results = tuple(Results(**each) for each in found["results"])
        return cls(**{**found, "machine": Machine.from_dict(found["machine"]), "results": results})

    def get(self, name: str) -> Results | None:
        return next((each for each in self.results if each.name == name), None)


# --- figures --------------------------------------------------------------------------------------


def number(value: float, metric: Metric) -> str:
    """Two digits after the point for seconds, none from 100 on, else one."""
    digits = 2 if metric.unit == "s" else 0 if value >= 99.95 else 1
    return f"{value:,.{digits}f}"


def cell(results: Results, metric: Metric) -> str:
    """A median with its extremes, or why there is none."""
    samples = results.all(metric.key)
    median = results.median(metric.key)
    if median is None:
        return results.notes.get(metric.key) or results.notes.get("") or _without_figure(results, metric)
    spread = f" ({number(min(samples), metric)}–{number(max(samples), metric)})" if len(samples) > 1 else ""
    caveat = ", nothing freed" if metric.key in WAKING and results.frees_nothing else ""
    return f"{number(median, metric)}{spread}{caveat}"


def _without_figure(results: Results, metric: Metric) -> str:
    if metric.key in {"sleep", "memory_asleep", "wake"} and results.sleeps is None:
        return "no sleep"
    return "by itself" if metric.key == "sleep" else "not measured"


def sleeps_how(results: Results) -> str:
    """What its sleep is, and whether it gave anything back."""
    if results.sleeps is None:
        return "no sleep"
    return results.sleeps + (" (nothing was freed)" if results.frees_nothing else "")


def ratio(mine: Results, theirs: Results, metric: Metric) -> str:
    """How many times better, as the median of the rounds, with extremes."""
    found = sorted(ratios(mine, theirs, metric))
    if not found:
        return NO_RATIO
    middle = found[len(found) // 2] if len(found) % 2 else (found[len(found) // 2 - 1] + found[len(found) // 2]) / 2
    return f"{middle:.2f}" + (f" ({found[0]:.2f}–{found[-1]:.2f})" if len(found) > 1 else "")


# --- terminal -------------------------------------------------------------------------------------


def lines(report: Report) -> list[str]:
    """Metric by metric, every engine beside shuteye."""
    width = max(len(title(report, each)) for each in report.results)
    mine = report.get("shuteye")
    shown = [f"{report.description}; {report.machine.words}; {report.settings}"]
    for metric in METRICS:
        better = "more is better" if metric.more_is_better else "less is better"
        shown += ["", f"{metric.title}, {metric.unit} ({better})"]
        for each in report.results:
            compared = ratio(mine, each, metric) if mine and each is not mine else NO_RATIO
            told = "" if compared == NO_RATIO else f"   shuteye is {compared} × as good"
            shown.append(f"  {title(report, each):<{width}}  {cell(each, metric)}{told}")
    return shown


# --- Markdown -------------------------------------------------------------------------------------


def page(reports: Sequence[Report], scored: Sequence[ScoreReport] = ()) -> str:
    """docs/benchmarks.md."""
    head = "# Benchmarks\n\n<!-- Written by `make bench ARGS=--docs` from benchmarks/results/; do not edit. -->\n\n"
    parts = [head, "How shuteye compares with other engines on a CPU, and how to measure it again.\n\n"]
    parts += ["```sh\nmake bench-peers    # installs the peers under ~/.cache/shuteye/peers; llama.cpp is compiled\n"]
    parts += ["make bench ARGS='--model smollm2 --docs'\nmake bench ARGS='--model llama-1b --format q4_0 --docs'\n"]
    parts += ["make bench ARGS='--level avx2 --docs'    # everyone held to an instruction set\n```\n\n"]
    parts += ["## What is measured\n\n", DEFINITIONS, "\nMedians, with minimum–maximum.\n"]
    parts += ["\n## Asked and measured\n\n", *_targets(reports)]
    parts += ["\n## Perplexity\n\n", PERPLEXITY] if scored else []
    for each in scored:
        parts += [f"\n{each.machine.title}, {each.date}\n\n", *_scores(each.scores)]
    for machine in machines(reports):
        parts.append(f"\n## {machine.title}\n")
        parts += ["".join(_section(report)) for report in reports if report.machine.key == machine.key]
    return "".join(parts)


def headline(reports: Sequence[Report]) -> str:
    """The README's table: how many times as good as the best other server, on which processor."""
    rows = [_row("shuteye is × as good as the best other server", list(HEADLINE.values()))]
    rows.append("|---" * (len(HEADLINE) + 1) + "|\n")
    for report in reports:
        mine = report.get("shuteye")
        peers = [each for each in report.results if each.name not in OWN]
        shown = []
        for metric in (targets.BY_KEY[key] for key in HEADLINE):
            best = best_peer(peers, metric)
            shown.append(ratio(mine, best, metric).split(" ")[0] if mine and best else NO_RATIO)
        name = f"{report.model}, {FORMATS[report.format].title}: {report.machine.title}, {report.date}"
        rows.append(_row(name, shown))
    return "".join(rows)


def machines(reports: Sequence[Report]) -> list[Machine]:
    """Each processor and instruction set once, in the order of their first reports."""
    return list({report.machine.key: report.machine for report in reversed(reports)}.values())[::-1]


def title(report: Report, results: Results) -> str:
    """An engine's name, and what it made of the weights where that is not the report's format."""
    made = FORMATS[report.format].openvino
    own = results.name == "openvino" and report.format != "bf16"
    return TITLES[results.name].replace("(", f"{made} (") if own else TITLES[results.name]


def _targets(reports: Sequence[Report]) -> list[str]:
    """What was asked of shuteye, in times a peer's figure, and what came of it on each processor."""
    columns = machines(reports)
    parts = ["shuteye's median over the other's; in bold what is asked. –: not measured there.\n"]
    for model in dict.fromkeys(report.model for report in reports):
        for form in FORMATS:
            found = {each.machine.key: each for each in reports if (each.model, each.format) == (model, form)}
            if not found:
                continue
            parts += [f"\n{model}, {FORMATS[form].title}\n\n", _row("", ["asked", *(each.title for each in columns)])]
            parts.append("|---" * (len(columns) + 2) + "|\n")
            for target in targets.of_format(form):
                shown = [_reached(found.get(each.key), target) for each in columns]
                parts.append(_row(target.title, [target.asked, *shown]))
    return parts


def _scores(scores: Sequence[Scores]) -> list[str]:
    """Perplexities, and root mean squares of differences between single tokens' log-probabilities."""
    heads = ["shuteye", "transformers", "differs", f"within {MOST_PERCENT}%", "llama.cpp differs", "shuteye's tokens"]
    rows = [_row("", [*heads, "llama.cpp's tokens", "between them"]), "|---" * (len(heads) + 3) + "|\n"]
    for each in scores:
        met = "met" if abs(each.percent) <= MOST_PERCENT else "not met"
        own = [f"{each.shuteye:.4f}", f"{each.reference:.4f}", f"{each.percent:+.3f}%", met]
        theirs = [f"{each.llama_percent:+.3f}%", f"{each.llama_apart:.4f}", f"{each.llama_from_shuteye:.4f}"]
        beside = theirs if each.llama_tokens else [NO_RATIO] * 3
        rows.append(_row(SCORED[each.format].title, [*own, beside[0], f"{each.apart:.4f}", *beside[1:]]))
    return rows


def _reached(report: Report | None, target: targets.Target) -> str:
    reached = None if report is None else target.reached(report.results)
    return NO_RATIO if reached is None else f"{reached:.2f}, {'met' if target.is_met(reached) else 'not met'}"


def _section(report: Report) -> list[str]:
    parts = [f"\n### {report.model}, {FORMATS[report.format].title}, {report.machine.title}\n\n"]
    parts += [f"{_capitalized(report.description)}. {report.settings}, {report.date}, {report.machine.words}.\n\n"]
    parts += [*_figures(report), "\n", *_ratios(report), "\nVersions and commands:\n\n"]
    for each in report.results:
        if each.command:
            how = f"{each.version}; sleep: {sleeps_how(each)}; `{each.command}`"
            parts.append(f"- {title(report, each)} — {how}\n")
    return parts


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def _figures(report: Report) -> list[str]:
    measured = [each for each in report.results if any(each.all(metric.key) for metric in METRICS)]
    missing = [each for each in report.results if each not in measured]
    rows = [_row("", [title(report, each) for each in measured]), "|---" * (len(measured) + 1) + "|\n"]
    rows += [_row(f"{metric.title}, {metric.unit}", [cell(each, metric) for each in measured]) for metric in METRICS]
    return rows + [f"\n{title(report, each)}: {each.notes.get('', 'not measured')}.\n" for each in missing]


def _ratios(report: Report) -> list[str]:
    """How many times better shuteye is than the best peer over HTTP, those in process, itself without sleep mode."""
    mine = report.get("shuteye")
    if mine is None:
        return []
    peers = [each for each in report.results if each.name not in OWN]
    others = [each for name in ("openvino", "llama-bench", "shuteye-plain") if (each := report.get(name))]
    rows = [_row("shuteye is × as good as", ["the best peer over HTTP", *(title(report, each) for each in others)])]
    rows.append("|---" * (len(others) + 2) + "|\n")
    for metric in METRICS:
        best = best_peer(peers, metric)
        beaten = f"{ratio(mine, best, metric)} {best.name}" if best else NO_RATIO
        rows.append(_row(metric.title, [beaten, *(ratio(mine, each, metric) for each in others)]))
    return rows


def _row(first: str, cells: Sequence[str]) -> str:
    return f"| {' | '.join([first, *(text.replace('|', '/') for text in cells)])} |\n"
