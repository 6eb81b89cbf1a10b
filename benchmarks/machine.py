"""The machine that is measured: its processor by family and model, its instruction sets, and what it can do at most.

Peaks are measured by peaks.cpp, compiled for this processor. Knows nothing of engines.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shuteye.config import default_cache_dir

LEVELS = {"amx": "amx_bf16", "avx512": "avx512_bf16", "avx2": "avx2"}
"""Instruction sets of shuteye's kernels, the best first, and the flag of /proc/cpuinfo that each needs."""
SHOWN_FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
VENDORS = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}
MICROARCHITECTURES = {
    ("amd", 25, 1): "Zen 3",
    ("amd", 25, 17): "Zen 4",
    ("amd", 26, 2): "Zen 5",
    ("intel", 6, 143): "Sapphire Rapids",
    ("intel", 6, 173): "Granite Rapids",
    ("intel", 6, 207): "Emerald Rapids",
}
"""(vendor, family, model) → what people call it; of others the numbers are shown."""
SOURCE = Path(__file__).parent / "peaks.cpp"
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-pthread")
PEAK_ROUNDS = 25
UNITS = {
    "read_gb_s": ("memory is read at", "GB/s"),
    "float32_gflops": ("float32", "GFLOP/s"),
    "bfloat16_gflops": ("bfloat16", "GFLOP/s"),
    "int8_gops": ("int8", "GOP/s"),
}


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine, and the instruction set that shuteye was held to.

    Attributes:
        vendor: "amd", "intel", or what the processor calls itself.
        name: of the processor, as it calls itself.
        flags: those of `SHOWN_FLAGS` that it has.
        level: the instruction set of shuteye's kernels; forced if `forced`.
        peaks: rates of all cores together by the keys of `UNITS`, one for each round; empty if they were not measured.
    """

    vendor: str
    family: int
    model: int
    name: str
    flags: tuple[str, ...]
    level: str
    cores: int
    memory_gib: int
    kernel: str
    forced: bool = False
    peaks: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What files of results are named after; one for each processor and instruction set."""
        return f"{self.vendor}-{self.family}-{self.model}-{self.level}"

    @property
    def title(self) -> str:
        numbers = f"family {self.family}, model {self.model}"
        known = MICROARCHITECTURES.get((self.vendor, self.family, self.model), numbers)
        return f"{self.name} ({known}), {'held to ' if self.forced else ''}{self.level}"

    @property
    def words(self) -> str:
        """What it is and, if that was measured, what it can do."""
        processor = f"{self.cores} cores of an {self.name}, family {self.family}, model {self.model}"
        found = f"{processor} ({', '.join(self.flags)}), {self.memory_gib} GiB, Linux {self.kernel}"
        shown = [f"{UNITS[key][0]} {self._rate(key)} {UNITS[key][1]}" for key in UNITS if self.peaks.get(key)]
        return found + (f"; {', '.join(shown)} at most" if shown else "")

    def _rate(self, key: str) -> str:
        """Memory has moods, so its median and extremes; of products the best, which is what the processor can do."""
        rates = self.peaks[key]
        if key != "read_gb_s":
            return f"{max(rates):,.0f}"
        return f"{statistics.median(rates):.1f} ({min(rates):.1f}–{max(rates):.1f})"

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Machine:
        peaks = {key: tuple(rates) for key, rates in found["peaks"].items()}
        return cls(**{**found, "flags": tuple(found["flags"]), "peaks": peaks})


def this_machine(*, level: str | None = None, measured: bool = True) -> Machine:
    """Where this process runs.

    Args:
        level: the instruction set that shuteye is held to, if it is.
        measured: whether peaks are measured now, which takes seconds and wants an idle machine.
    """
    facts = _cpuinfo(Path("/proc/cpuinfo").read_text())
    flags = set(facts["flags"].split())
    best = next((level for level, flag in LEVELS.items() if flag in flags), "portable")
    return Machine(
        vendor=VENDORS.get(facts["vendor_id"], facts["vendor_id"].lower()),
        family=int(facts["cpu family"]),
        model=int(facts["model"]),
        name=re.sub(r"\((R|TM)\)", "", facts["model name"]).strip(),
        flags=tuple(flag for flag in SHOWN_FLAGS if flag in flags),
        level=level or best,
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)),
        kernel=platform.release().split("-")[0],
        forced=level is not None and level != best,
        peaks=measure_peaks() if measured else {},
    )


def _cpuinfo(text: str) -> dict[str, str]:
    """What is said of the first processor; what other architectures do not say is unknown."""
    unknown = {"vendor_id": platform.machine(), "cpu family": "0", "model": "0", "model name": platform.machine()}
    pairs = (line.partition(":") for line in text.split("\n\n", maxsplit=1)[0].splitlines())
    return unknown | {"flags": ""} | {name.strip(): value.strip() for name, _, value in pairs}


def measure_peaks(*, rounds: int = PEAK_ROUNDS) -> dict[str, tuple[float, ...]]:
    """Rates of all cores together by the keys of `UNITS`, one for each round; nothing on other than x86."""
    if platform.machine() not in {"x86_64", "AMD64"}:
        return {}
    program = default_cache_dir() / "benchmarks" / "peaks"
    program.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([os.environ.get("CXX", "c++"), *FLAGS, str(SOURCE), "-o", str(program)], check=True)
    threads = str(len(os.sched_getaffinity(0)))
    done = subprocess.run([program, threads, str(rounds)], check=True, capture_output=True, text=True)
    return {key: tuple(rates) for key, rates in json.loads(done.stdout).items()}
