"""The picture at the top of the README: a few figures of every engine as bars, processor by processor, written as SVG.

Knows nothing of files; needs no plotting library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from checkpoints import FORMATS
from report import OWN, TITLES, Report, number
from rounds import METRICS, WAKING, Metric, Results

PANELS = (
    ("decode_1", "Decode, 1 stream"),
    ("decode_16", "Decode, 16 streams"),
    ("ttft_512", "First token, 512 tokens"),
    ("start", "Process start to first token"),
    ("memory_asleep", "Memory asleep"),
    ("wake", "Wake to first token**"),
)
DRAWN = ("smollm2", "bf16")
COLUMNS = 3
WIDTH, MARGIN, GAP = 960, 24, 36
PANEL_WIDTH = (WIDTH - 2 * MARGIN - (COLUMNS - 1) * GAP) / COLUMNS
ROW, BAR, LABEL, FIGURE, TITLE = 22, 14, 88, 62, 30
SHORT = {
    "shuteye": "shuteye",
    "openvino": "OpenVINO*",
    "llama.cpp": "llama.cpp",
    "llama-bench": "llama-bench*",
    "vllm": "vLLM",
}
FOOT = "* in process, without HTTP   ** of those that freed memory"
STYLE = """
  text { font: 12px ui-sans-serif, system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #3d4451 }
  .title { font-weight: 600; fill: #15181e } .unit, .foot { fill: #6b7280 } .own { font-weight: 600; fill: #15181e }
  .bar { fill: #c3c9d4 } .bar.own { fill: #4f46e5 }
"""


@dataclass(frozen=True, slots=True)
class Panel:
    """One metric, one bar per engine that has a figure."""

    metric: Metric
    title: str
    bars: tuple[tuple[Results, float], ...]

    @property
    def height(self) -> float:
        return TITLE + ROW * len(self.bars)


def draw(reports: Sequence[Report]) -> str:
    """An SVG document of one model in one format, on every processor where it was measured."""
    shapes: list[str] = []
    top = float(MARGIN)
    for report in (each for each in reports if (each.model, each.format) == DRAWN):
        shapes.append(f'<text class="title" x="{MARGIN}" y="{top + 12:.1f}">{escape(report.machine.title)}</text>')
        drawn, top = _draw_report(report, top + TITLE)
        shapes += drawn
    shapes.append(f'<text class="foot" x="{MARGIN}" y="{top + 8:.0f}">{escape(FOOT)}</text>')
    return _document(shapes, height=top + 16 + MARGIN)


def _draw_report(report: Report, top: float) -> tuple[list[str], float]:
    """All panels of one processor, and where they end."""
    panels = [_panel(report, key, title) for key, title in PANELS]
    shapes: list[str] = []
    for begin in range(0, len(panels), COLUMNS):
        row = panels[begin : begin + COLUMNS]
        for index, panel in enumerate(row):
            shapes += _draw_panel(panel, MARGIN + index * (PANEL_WIDTH + GAP), top)
        top += max(panel.height for panel in row) + GAP / 2
    for line in (
        f"{report.model}, {FORMATS[report.format].title}, {report.date}, medians of {report.settings}.",
        f"{report.machine.cores} cores, {report.machine.memory_gib} GiB, {', '.join(report.machine.flags)}.",
    ):
        shapes.append(f'<text class="foot" x="{MARGIN}" y="{top + 8:.0f}">{escape(line)}</text>')
        top += 16
    return shapes, top + GAP / 2


def _panel(report: Report, key: str, title: str) -> Panel:
    metric = next(metric for metric in METRICS if metric.key == key)
    shown = [each for each in report.results if each.name == OWN[0] or each.name not in OWN]
    able = [each for each in shown if not (key in WAKING and each.frees_nothing)]
    found = [(each, median) for each in able if (median := each.median(key)) is not None]
    return Panel(metric, title, tuple(found))


def _draw_panel(panel: Panel, left: float, top: float) -> list[str]:
    better = "more" if panel.metric.more_is_better else "less"
    title = f'<tspan class="title">{escape(panel.title)}</tspan>'
    unit = f'<tspan class="unit" dx="6">{panel.metric.unit}, {better} is better</tspan>'
    shapes = [f'<text x="{left:.1f}" y="{top + 12:.1f}">{title}{unit}</text>']
    longest = max((value for _, value in panel.bars), default=1.0)
    for index, (results, value) in enumerate(panel.bars):
        figure = number(value, panel.metric)
        shapes += _draw_bar(results.name, figure, value / longest, left=left, top=top + TITLE + index * ROW)
    return shapes


def _draw_bar(name: str, figure: str, share: float, *, left: float, top: float) -> Sequence[str]:
    own = " own" if name in OWN else ""
    begin = left + LABEL
    length = max(1.5, share * (PANEL_WIDTH - LABEL - FIGURE))
    middle = top + BAR - 3
    return (
        f'<text class="label{own}" x="{left:.1f}" y="{middle:.1f}">{escape(SHORT.get(name, name))}</text>',
        f'<rect class="bar{own}" x="{begin:.1f}" y="{top:.1f}" width="{length:.1f}" height="{BAR}" rx="2"/>',
        f'<text class="figure{own}" x="{begin + length + 6:.1f}" y="{middle:.1f}">{figure}</text>',
    )


def _document(shapes: Sequence[str], *, height: float) -> str:
    size = f'width="{WIDTH}" height="{height:.0f}" viewBox="0 0 {WIDTH} {height:.0f}"'
    described = ", ".join(TITLES[name] for name in TITLES if name not in OWN)
    body = "\n".join(shapes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="shuteye beside {escape(described)}">\n'
        f"<style>{STYLE}</style>\n"
        f'<rect width="{WIDTH}" height="{height:.0f}" rx="10" fill="#ffffff"/>\n{body}\n</svg>\n'
    )
