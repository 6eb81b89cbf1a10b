"""Results of serve.py as lines for a terminal, as JSON, and as docs/benchmarks.md.

Knows nothing of how anything was measured; the words that say it are here.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rounds import METRICS, WAKING, Metric, Results, best_peer, ratios

TITLES = {
    "shuteye": "shuteye",
    "shuteye-plain": "shuteye, sleep mode off",
    "llama.cpp": "llama.cpp server",
    "openvino": "OpenVINO GenAI (in process)",
    "transformers": "transformers serve",
    "vllm": "vLLM on CPU",
}
OWN = ("shuteye", "shuteye-plain")
NO_RATIO = "–"

DEFINITIONS = """\
Every engine serves the same checkpoint in 16-bit floats on all cores, and gets the same requests: `/v1/completions`,
streamed, temperature 0, a fixed number of tokens whatever the model would rather say. Every prompt is new, so that no
cache of prompts helps anyone, and is checked to be as many tokens for the engine as for us, as is the answer. OpenVINO
GenAI has no server here; it runs in a process of its own and pays for no HTTP. Engines take turns: in each round each
is started, measured and ended.

- **Start of the process to first token**: from spawning it, with the checkpoint's files in the page cache, to the first
  token of a 32-token prompt; the request is repeated until the server takes it.
- **First token**: from sending one request, with nothing else running, to its first piece of text.
- **Decode, N streams**: N prompts of 200 tokens sent at once; tokens of all streams per second, from the moment when
  every stream had its first token to the last token. This is the figure that claims are about.
- **End to end, N streams**: the same requests; all generated tokens over the whole time, prompts included.
- **Memory**: proportional set size of the process and its descendants, right after 16 streams have ended; and asleep.
  Everyone has a KV cache for 16 streams of 2,560 tokens; shuteye's costs memory as it fills, most others' at once.
- **Sleep**: how long it took until it said so. llama.cpp goes to sleep by itself after idle seconds.
- **Wake to first token**: from sending a 32-token request to a sleeping engine to its first token; the request wakes it
  (vLLM is told to wake first).
"""


@dataclass(frozen=True, slots=True)
class Report:
    """One run on one model.

    Attributes:
        model: its key in `checkpoints.MODELS`; `description` is for people.
        settings: how the run was done, in words.
    """

    model: str
    description: str
    date: str
    machine: str
    settings: str
    results: tuple[Results, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Report:
        results = tuple(Results(**each) for each in found["results"])
        return cls(**{**found, "results": results})

    def get(self, name: str) -> Results | None:
        return next((each for each in self.results if each.name == name), None)


def machine() -> str:
    """This machine in a few words."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    known = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if re.search(rf"\b{name}\b", cpuinfo)]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    cores = len(os.sched_getaffinity(0))
    name = re.sub(r"\((R|TM)\)", "", model[1]).strip() if model else platform.machine()
    return (
        f"{cores} cores of an {name} ({', '.join(known)}), {memory:.0f} GiB, Linux {platform.release().split('-')[0]}"
    )


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
    width = max(len(TITLES[each.name]) for each in report.results)
    mine = report.get("shuteye")
    shown = [f"{report.description}; {report.machine}; {report.settings}"]
    for metric in METRICS:
        better = "more is better" if metric.more_is_better else "less is better"
        shown += ["", f"{metric.title}, {metric.unit} ({better})"]
        for each in report.results:
            compared = ratio(mine, each, metric) if mine and each is not mine else NO_RATIO
            told = "" if compared == NO_RATIO else f"   shuteye is {compared} × as good"
            shown.append(f"  {TITLES[each.name]:<{width}}  {cell(each, metric)}{told}")
    return shown


# --- Markdown -------------------------------------------------------------------------------------


def page(reports: Sequence[Report]) -> str:
    """docs/benchmarks.md."""
    head = "# Benchmarks\n\n<!-- Written by `make bench ARGS=--docs` from benchmarks/results/; do not edit. -->\n\n"
    parts = [head, "How shuteye compares with other engines on a CPU, and how to measure it again.\n\n"]
    parts += ["```sh\nmake bench-peers    # installs the peers under ~/.cache/shuteye/peers; llama.cpp is compiled\n"]
    parts += ["make bench ARGS='--model smollm2 --docs'\nmake bench ARGS='--model llama-1b --docs'\n```\n\n"]
    parts += ["## What is measured\n\n", DEFINITIONS, "\nMedians, with minimum–maximum.\n"]
    parts += ["".join(_section(report)) for report in reports]
    return "".join(parts)


def _section(report: Report) -> list[str]:
    parts = [f"\n## {report.model}\n\n{_capitalized(report.description)}. {report.settings}, {report.date}, "]
    parts += [f"{report.machine}.\n\n", *_figures(report), "\n", *_ratios(report), "\n### Versions and commands\n\n"]
    for each in report.results:
        if each.command:
            parts.append(f"- {TITLES[each.name]} — {each.version}; sleep: {sleeps_how(each)}; `{each.command}`\n")
    return parts


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def _figures(report: Report) -> list[str]:
    measured = [each for each in report.results if any(each.all(metric.key) for metric in METRICS)]
    missing = [each for each in report.results if each not in measured]
    rows = [_row("", [TITLES[each.name] for each in measured]), "|---" * (len(measured) + 1) + "|\n"]
    rows += [_row(f"{metric.title}, {metric.unit}", [cell(each, metric) for each in measured]) for metric in METRICS]
    return rows + [f"\n{TITLES[each.name]}: {each.notes.get('', 'not measured')}.\n" for each in missing]


def _ratios(report: Report) -> list[str]:
    """How many times better shuteye is than the best peer over HTTP, OpenVINO, and itself without sleep mode."""
    mine, openvino, plain = report.get("shuteye"), report.get("openvino"), report.get("shuteye-plain")
    if mine is None:
        return []
    peers = [each for each in report.results if each.name not in OWN]
    rows = [_row("shuteye is × as good as", ["the best peer over HTTP", TITLES["openvino"], TITLES["shuteye-plain"]])]
    rows.append("|---|---|---|---|\n")
    for metric in METRICS:
        best = best_peer(peers, metric)
        beaten = f"{ratio(mine, best, metric)} {best.name}" if best else NO_RATIO
        others = [ratio(mine, each, metric) if each else NO_RATIO for each in (openvino, plain)]
        rows.append(_row(metric.title, [beaten, *others]))
    return rows


def _row(first: str, cells: Sequence[str]) -> str:
    return f"| {' | '.join([first, *(text.replace('|', '/') for text in cells)])} |\n"
