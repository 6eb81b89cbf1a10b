"""What is asked of shuteye beside other engines: figure by figure, how many times another's it may or must be.

Knows nothing of how it is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rounds import METRICS, Metric, Results, best_peer

BEST_SERVER, BEST = "the best server", "the best of all"
OWN = ("shuteye", "shuteye-plain")
BY_KEY = {metric.key: metric for metric in METRICS}


@dataclass(frozen=True, slots=True)
class Target:
    """One figure of shuteye's against one other.

    Attributes:
        key: of shuteye's metric; `other_key` of what it is held against, if that is another.
        factor: what its median over the other's must be: at least, where more is better, else at most.
        other: an engine's name, or one of `BEST_SERVER` and `BEST`; "" is the number one of the metric's unit.
    """

    key: str
    factor: float
    other: str
    other_key: str = ""

    @property
    def metric(self) -> Metric:
        return BY_KEY[self.key]

    @property
    def title(self) -> str:
        return f"{self.metric.title}, beside {self._beside}" if self.other else self.metric.title

    @property
    def _beside(self) -> str:
        names = {"llama.cpp": "llama.cpp's server", "openvino": "OpenVINO", "shuteye": "its own"}
        what = f" {BY_KEY[self.other_key].title.lower()}" if self.other_key else ""
        return names.get(self.other, self.other) + what

    @property
    def asked(self) -> str:
        unit = "×" if self.other else self.metric.unit
        return f"**{'≥' if self.metric.more_is_better else '≤'} {self.factor:g} {unit}**"

    def reached(self, results: Sequence[Results]) -> float | None:
        """shuteye's median over the other's; None where either has none."""
        mine = next((each for each in results if each.name == "shuteye"), None)
        figure = mine.median(self.key) if mine else None
        if figure is None or not self.other:
            return figure
        other = self._found(results)
        theirs = other.median(self.other_key or self.key) if other else None
        return figure / theirs if theirs else None

    def is_met(self, reached: float) -> bool:
        return reached >= self.factor if self.metric.more_is_better else reached <= self.factor

    def _found(self, results: Sequence[Results]) -> Results | None:
        peers = [each for each in results if each.name not in OWN]
        choices: dict[str, Callable[[], Results | None]] = {
            BEST_SERVER: lambda: best_peer(peers, self.metric),
            BEST: lambda: best_peer(peers, self.metric, in_process=True),
        }
        if self.other in choices:
            return choices[self.other]()
        return next((each for each in results if each.name == self.other), None)


BFLOAT16 = (
    Target("decode_1", 1.0, "llama-bench"),
    Target("decode_1", 1.1, "llama.cpp"),
    *(Target(key, 1.5, BEST_SERVER) for key in ("decode_8", "decode_16")),
    *(Target(key, 1.1, "openvino") for key in ("decode_8", "decode_16")),
    *(Target(key, 0.9, BEST) for key in ("ttft_512", "ttft_2048")),
)
QUANTIZED = (
    Target("decode_1", 1.1, "llama.cpp"),
    *(Target(key, 1.5, "llama.cpp") for key in ("decode_8", "decode_16")),
    *(Target(key, 0.7, "llama.cpp") for key in ("ttft_512", "ttft_2048")),
)
ALWAYS = (
    Target("start", 0.8, "llama.cpp"),
    Target("memory_awake", 1.1, "llama.cpp"),
    Target("disk", 1.03, "llama.cpp"),
    Target("memory_asleep", 120.0, ""),
    Target("wake", 1.5, "shuteye", "ttft_32"),
)
"""Asleep, the engine's process and the server's own may have 60 MiB each."""


def of_format(name: str) -> tuple[Target, ...]:
    """What is asked of a format of `checkpoints.FORMATS`."""
    return (*(BFLOAT16 if name == "bf16" else QUANTIZED), *ALWAYS)
