"""Is a wake from disk shorter where weights take fewer bits? Cold wakes of SmolLM2, format by format.

Round after round, every format in turn: the image's pages are dropped from the page cache, read once in order (what
the disk gives at that moment), dropped again, and the model wakes. Prints medians, and each format's bytes and time
against those of bfloat16. Run nothing else meanwhile.

    python benchmarks/cold_wake.py [--rounds 5] [--formats bf16,q8_0,q4_0,q4_k_m]
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from checkpoints import FORMATS, prepare
from peers.llama_cpp import program
from shuteye import LLM
from sleep_wake import MIB, drop_page_cache, first_token, read_rate_bytes_s

KV_BYTES = 64 * MIB
QUANTIZED_HERE = frozenset({"q8_0", "q4_0"})
"""Formats that `--quantization` makes of the bfloat16 checkpoint, block for block as llama.cpp would."""


@dataclass
class ColdWakes:
    """Samples of one format, in seconds.

    Attributes:
        reading: what reading the image once in order takes.
    """

    format: str
    nbytes: int
    waking: list[float] = field(default_factory=list)
    reading: list[float] = field(default_factory=list)

    def measure(self, llm: LLM) -> None:
        """One cold wake of an awake model, whose first token follows untimed."""
        image = next(Path(llm.info.image_dir).glob("weights*.bin"))
        llm.sleep(1)
        self.reading.append(image.stat().st_size / read_rate_bytes_s(image))
        drop_page_cache(image)
        begin = time.perf_counter()
        llm.wake_up()
        self.waking.append(time.perf_counter() - begin)
        first_token(llm)

    def row(self, base: ColdWakes) -> str:
        """A line of the table, beside bfloat16's."""
        waking, reading = statistics.median(self.waking), statistics.median(self.reading)
        share = waking / statistics.median(base.waking)
        spread = f"{min(self.waking) * 1e3:.0f}–{max(self.waking) * 1e3:.0f}"
        return (
            f"| {FORMATS[self.format].title} | {self.nbytes / MIB:,.0f} | {waking * 1e3:.0f} ({spread}) | "
            f"{reading * 1e3:.0f} | {self.nbytes / base.nbytes:.2f} | {share:.2f} |"
        )


def opened(form: str) -> LLM:
    plain = prepare("smollm2")
    model, quantization = str(plain.directory), "none"
    if form in QUANTIZED_HERE:
        quantization = form
    elif form != "bf16":
        model, quantization = str(prepare("smollm2", form, quantize=program("llama-quantize")).gguf), "auto"
    return LLM(
        model,
        quantization=quantization,
        enable_sleep_mode=True,
        dtype="bfloat16",
        kv_cache_memory=KV_BYTES,
        max_model_len=2048,
        offline=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--formats", default=",".join(FORMATS), help=f"default {','.join(FORMATS)}; bf16 is always measured"
    )
    arguments = parser.parse_args()
    forms = list(dict.fromkeys(["bf16", *arguments.formats.split(",")]))
    with ExitStack() as stack:
        models = {form: stack.enter_context(opened(form)) for form in forms}
        found = {form: ColdWakes(form, llm.info.weights_bytes) for form, llm in models.items()}
        for llm in models.values():
            first_token(llm)
        for _ in range(arguments.rounds):
            for form, llm in models.items():
                found[form].measure(llm)
    print("| | MiB | cold wake, ms | reading once, ms | bytes / bfloat16's | time / bfloat16's |")
    print("|---|---|---|---|---|---|")
    for each in found.values():
        print(each.row(found["bf16"]))


if __name__ == "__main__":
    main()
