"""What sleeping and waking cost on this machine: time, memory, and the same against a full restart.

Prints one table per model, medians of several rounds with min–max. Run nothing else meanwhile.

    python benchmarks/sleep_wake.py [--rounds 7] [--large-layers 22] [--no-large] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx2
import torch

from shuteye import LLM, SamplingParams
from shuteye.config import default_cache_dir
from shuteye.testing import tiny_model

GIB = 1 << 30
MIB = 1 << 20
ONE_TOKEN = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
PROMPT = list(range(1000, 1032))  # 32 tokens
KV_BYTES = 512 * MIB


@dataclass
class Figures:
    """Samples by name, in milliseconds unless the name says otherwise."""

    model: str
    weights_bytes: int = 0
    samples: dict[str, list[float]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.samples.setdefault(name, []).append(value)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.add(name, (time.perf_counter() - begin) * 1e3)

    def median(self, name: str) -> float:
        return statistics.median(self.samples[name])

    def print(self) -> None:
        print(f"\n{self.model}: {self.weights_bytes / MIB:,.0f} MiB of weights")
        width = max(map(len, self.samples | self.notes))
        for name, values in self.samples.items():
            per_gib = self.median(name) / (self.weights_bytes / GIB)
            spread = f"{min(values):9.1f} – {max(values):8.1f}"
            print(f"  {name:<{width}}  {self.median(name):9.1f} ms  ({spread})  {per_gib:9.1f} ms/GiB")
        for name, note in self.notes.items():
            print(f"  {name:<{width}}  {note}")


def drop_page_cache(path: Path) -> None:
    """Make the kernel forget a file's pages; they must be clean and unmapped."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def read_rate_bytes_s(path: Path) -> float:
    """How fast the disk gives a file that is not in the page cache, read in order in large pieces."""
    drop_page_cache(path)
    begin = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        piece = bytearray(8 * MIB)
        while file.readinto(piece):
            pass
    return path.stat().st_size / (time.perf_counter() - begin)


def first_token(llm: LLM) -> None:
    llm.reset_prefix_cache()
    llm.generate([PROMPT], ONE_TOKEN)


def measure_clean(llm: LLM, figures: Figures, rounds: int) -> None:
    for _ in range(rounds):
        with figures.timed("awake: time to first token"):
            first_token(llm)
        with figures.timed("sleep level 1, nothing written"):
            llm.sleep(1)
        with figures.timed("wake, hot page cache"):
            llm.wake_up()
        llm.sleep(1)
        with figures.timed("wake to first token, hot page cache"):
            llm.wake_up()
            first_token(llm)


def measure_cold(llm: LLM, figures: Figures, rounds: int) -> None:
    image = next(Path(llm.info.image_dir).glob("weights*.bin"))
    rates = []
    for _ in range(rounds):
        llm.sleep(1)
        rates.append(read_rate_bytes_s(image))
        drop_page_cache(image)
        with figures.timed("wake, dropped page cache"):
            llm.wake_up()
    rate = statistics.median(rates)
    reached = figures.weights_bytes / (figures.median("wake, dropped page cache") / 1e3)
    figures.notes["disk"] = f"reads {rate / 1e9:.2f} GB/s in order; the cold wake reached {reached / rate:.0%} of it"


def measure_level_2(llm: LLM, figures: Figures, rounds: int) -> None:
    for _ in range(rounds):
        with figures.timed("sleep level 2"):
            llm.sleep(2)
        with figures.timed("wake from level 2 (reload)"):
            llm.wake_up()


def measure_written(
    llm: LLM, figures: Figures, rounds: int, tensors: Callable[[], Iterator[tuple[str, torch.Tensor]]]
) -> None:
    for _ in range(rounds):
        llm.sleep(2)
        llm.wake_up(["weights"])
        with figures.timed("update every weight in place"):
            llm.update_weights(tensors())
        llm.wake_up()
        with figures.timed("sleep level 1, every weight written"):
            llm.sleep(1)
        with figures.timed("wake, every weight written"):
            llm.wake_up()
    llm.reload_weights()


def measure_memory(llm: LLM, figures: Figures) -> None:
    llm.generate([[token] * 1000 for token in range(100, 108)], ONE_TOKEN)  # touch some of the KV cache
    rss_before = smaps_total_bytes()
    report = llm.sleep(1)
    rss_after = smaps_total_bytes()
    held = sum(tag.resident_bytes for tag in llm.state.tags)
    figures.notes["memory"] = (
        f"{report.freed_bytes / MIB:,.1f} MiB reported freed, {(rss_before - rss_after) / MIB:,.1f} MiB by smaps; "
        f"{held} bytes of weights and KV cache left; residual {report.residual_bytes / MIB:,.1f} MiB"
    )
    llm.wake_up()


def smaps_total_bytes() -> int:
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"^Rss:\s+(\d+)", rollup, re.MULTILINE)[1]) * 1024  # type: ignore[index]


RESTART = """
import sys, time
from shuteye import LLM, SamplingParams
llm = LLM({model!r}, dtype="bfloat16", kv_cache_memory={kv}, max_model_len=2048, offline=True)
llm.generate([{prompt!r}], SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True))
print("first token", flush=True)
"""


def start_once(model: str) -> float:
    """Milliseconds from the start of a process with `LLM` in it to its first token."""
    program = RESTART.format(model=model, kv=KV_BYTES, prompt=PROMPT)
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"first token\n"
    elapsed_ms = (time.perf_counter() - begin) * 1e3
    process.wait()
    return elapsed_ms


def measure_restart(model: str, figures: Figures, rounds: int) -> None:
    """A new process with `LLM` in it, against the wake of one."""
    for _ in range(rounds):
        figures.add("restart of the process to first token", start_once(model))
    compare(figures, "restart of the process to first token", "wake to first token, hot page cache")


def compare(figures: Figures, slow: str, fast: str) -> None:
    ratio = figures.median(slow) / figures.median(fast)
    figures.notes[f"{slow} ÷ {fast}"] = f"{ratio:.0f}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def ask_for_one_token(http: httpx2.Client) -> bool:
    """True if the server gave a token; a prompt of its own each time, so that no prefix is cached."""
    prompt = [1000 + time.perf_counter_ns() % 1000, *PROMPT[1:]]
    answer = http.post(
        "/v1/completions", json={"prompt": prompt, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
    )
    return answer.status_code == 200


@contextmanager
def server(model: str) -> Iterator[httpx2.Client]:
    """`shuteye serve`, from the command line, until it has answered once."""
    port = free_port()
    flags = ["--port", str(port), "--kv-cache-memory", str(KV_BYTES), "--max-model-len", "2048", "--dtype", "bfloat16"]
    process = subprocess.Popen(
        [sys.executable, "-m", "shuteye", "serve", model, "--enable-sleep-mode", "--offline", *flags],
        env=os.environ | {"SHUTEYE_SERVER_DEV_MODE": "1"},
        stderr=subprocess.DEVNULL,
    )
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            while True:
                try:
                    if ask_for_one_token(http):
                        break
                except httpx2.TransportError:
                    pass  # not listening yet
                time.sleep(0.01)
            yield http
    finally:
        process.terminate()
        process.wait()


def measure_server(model: str, figures: Figures, rounds: int) -> None:
    """The same over HTTP: what a user of `shuteye serve` waits for."""
    for _ in range(rounds):
        begin = time.perf_counter()
        with server(model) as http:
            figures.add("restart of the server to first token", (time.perf_counter() - begin) * 1e3)
            for _ in range(3):
                with figures.timed("HTTP: awake, time to first token"):
                    ask_for_one_token(http)
                slept = http.post("/sleep").raise_for_status().json()
                figures.add("HTTP: what stays in the engine process, MiB", slept["residual_bytes"] / MIB)
                with figures.timed("HTTP: wake to first token"):
                    http.post("/wake_up").raise_for_status()
                    ask_for_one_token(http)
    compare(figures, "restart of the server to first token", "HTTP: wake to first token")


def measure(
    model: str, name: str, *, rounds: int, tensors: Callable[[], Iterator[tuple[str, torch.Tensor]]] | None
) -> Figures:
    figures = Figures(name)
    start_once(model)  # a first start makes the image; its pages in the cache are not yet as later starts find them
    options = {"dtype": "bfloat16", "kv_cache_memory": KV_BYTES, "max_model_len": 2048}
    with LLM(model, enable_sleep_mode=True, **options) as llm:
        figures.weights_bytes = llm.info.weights_bytes
        first_token(llm)
        measure_clean(llm, figures, rounds)
        measure_level_2(llm, figures, rounds)
        measure_cold(llm, figures, min(rounds, 5))
        measure_memory(llm, figures)
        if tensors is not None:
            measure_written(llm, figures, min(rounds, 3), tensors)
    measure_restart(model, figures, min(rounds, 5))
    measure_server(model, figures, min(rounds, 5))
    return figures


def tensors_of(directory: Path) -> Callable[[], Iterator[tuple[str, torch.Tensor]]]:
    from safetensors import safe_open

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for path in sorted(directory.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    yield name, file.get_tensor(name)

    return tensors


def large_model(directory: Path, num_layers: int) -> Path:
    """A random Llama of TinyLlama's shape (1.1 billion parameters with 22 layers), written once."""
    if not (directory / "config.json").exists():
        print(f"Writing a random model with {num_layers} layers to {directory} …", flush=True)
        tiny_model(
            directory,
            num_layers=num_layers,
            vocab_size=32_000,
            dtype=torch.bfloat16,
            head_dim=64,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            initializer_range=0.02,
            hidden_size=2048,
            intermediate_size=5632,
            num_attention_heads=32,
            num_key_value_heads=4,
        )
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--large-layers", type=int, default=22)
    parser.add_argument("--no-large", action="store_true", help="leave out the larger model")
    parser.add_argument("--json", type=Path, help="also write all samples to this file")
    arguments = parser.parse_args()
    figures = [measure(arguments.model, arguments.model, rounds=arguments.rounds, tensors=None)]
    figures[0].print()
    if not arguments.no_large:
        directory = large_model(
            default_cache_dir() / "benchmarks" / f"llama-{arguments.large_layers}", arguments.large_layers
        )
        figures.append(measure(str(directory), directory.name, rounds=arguments.rounds, tensors=tensors_of(directory)))
        figures[1].print()
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(each) for each in figures], indent=2))


if __name__ == "__main__":
    main()
