"""Many models behind one port: what they cost asleep, how soon one is back, and whether a budget holds under load.

Serves SmolLM2, MiniLM, Whisper and random Llamas of 10 to 300 MB. Measures:

    asleep      Σ PSS of all processes with every model unloaded, of ten models and of all; the difference for each one
    wake        from a request to its first token, awake, from levels 1 and 2, and unloaded, by turns
    requests    mixed requests of several clients on a budget that holds a few models: lost, wrong, bytes over the
                budget (what all engine processes have for themselves, sampled every 50 ms), and first tokens by where
                the model was

    make bench-fleet
    python benchmarks/fleet.py --models 20 --requests 10000 --budget 600MiB

Run nothing else meanwhile. Checkpoints and images are kept under the cache directory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from checkpoints import KEPT, LOGS
from peers.process import Process, ending_engines, free_port
from shuteye.cli.quantities import parse_size
from shuteye.memory.process_memory import private_bytes

MIB = 1 << 20
REAL = ("smollm2-135m", "minilm-l6", "whisper-tiny.en")
SPEECH = Path(__file__).parent.parent / "tests/data/speech.ogg"
SIZES = ((256, 6), (384, 8), (512, 10), (640, 12), (896, 14), (1024, 16))
"""Hidden size and layers of random Llamas: 10 to 300 MB in bfloat16."""
READY_S = 1200.0
SAMPLE_S = 0.05

MAKE = """
import sys, torch
from shuteye.testing import tiny_model
for line in sys.argv[1:]:
    path, hidden, layers, seed = line.split(",")
    hidden = int(hidden)
    tiny_model(path, seed=int(seed), dtype=torch.bfloat16, hidden_size=hidden, intermediate_size=3 * hidden,
               num_layers=int(layers), num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, head_dim=64)
"""


def random_models(count: int) -> list[str]:
    """Paths of random checkpoints, made where they are not there."""
    wanted = [(str(KEPT / "fleet" / f"random-{i}"), *SIZES[i % len(SIZES)], i) for i in range(count)]
    missing = [",".join(map(str, one)) for one in wanted if not Path(one[0], "config.json").is_file()]
    if missing:
        print(f"Making {len(missing)} random checkpoints …", flush=True)
        subprocess.run([sys.executable, "-c", MAKE, *missing], check=True)
    return [path for path, *_rest in wanted]


@contextmanager
def served(models: Sequence[str], *flags: str) -> Iterator[Fleet]:
    """A server of these models, all of which were loaded once."""
    port = free_port()
    command = [sys.executable, "-m", "shuteye", "serve", *models, "--port", str(port), "--dev-mode", *flags]
    began = time.perf_counter()
    process = Process(command, log=LOGS / "fleet.log")
    try:
        fleet = Fleet(process, f"http://127.0.0.1:{port}", list(models))
        fleet.wait_until_loaded()
        print(f"{len(models)} models were loaded once in {time.perf_counter() - began:.1f} s", flush=True)
        yield fleet
    finally:
        process.stop()


@dataclass
class Fleet:
    """A running server."""

    process: Process
    url: str
    models: list[str]
    http: httpx2.Client = field(init=False)

    def __post_init__(self) -> None:
        self.http = httpx2.Client(base_url=self.url, timeout=120.0)

    def wait_until_loaded(self) -> None:
        """Return once every model was loaded."""
        waiting = list(self.models)
        deadline = time.monotonic() + READY_S
        while waiting:
            self.process.check_alive()
            assert time.monotonic() < deadline, f"not loaded in time: {waiting}"
            try:
                status = self.state(waiting[0])["status"]
            except httpx2.TransportError:
                status = "starting"
            assert status != "failed", self.state(waiting[0])["failure"]
            if status == "starting":
                time.sleep(0.05)
            else:
                waiting.pop(0)

    def state(self, model: str) -> dict[str, Any]:
        """What the server says of a model."""
        found: dict[str, Any] = self.http.get("/state", params={"model": model}).json()
        return found

    def where(self, model: str) -> str:
        """`awake`, `level 1`, `level 2` or `unloaded`."""
        state = self.state(model)
        if state["status"] == "unloaded":
            return "unloaded"
        level = state["state"]["level"]
        return "awake" if level is None else f"level {level}"

    def move(self, model: str, where: str) -> None:
        """Put a model to sleep as the fleet does: an operator's sleep, undone for requests by the policy `wake`."""
        if where == "awake":
            self.call("/wake_up", model)
        elif where == "unloaded":
            self.call("/unload", model)
        else:
            self.call("/sleep", model, level=where.removeprefix("level "))

    def call(self, path: str, model: str, **params: str) -> None:
        """A control call."""
        answer = self.http.post(path, params={"model": model, **params})
        assert answer.is_success, answer.text

    def first_token_s(self, model: str, prompt: str) -> float:
        """From sending a request to its first piece of text."""
        body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "stream": True}
        began = time.perf_counter()
        with self.http.stream("POST", "/v1/completions", json=body) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    return time.perf_counter() - began
        raise AssertionError("a stream without a token")

    def answer(self, model: str, prompt: str) -> str:
        """The answer to a request of the model's own kind, as something that can be compared."""
        if model == REAL[1]:
            found = self.http.post("/v1/embeddings", json={"model": model, "input": prompt})
            found.raise_for_status()
            return json.dumps([round(x, 2) for x in found.json()["data"][0]["embedding"][:16]])
        if model == REAL[2]:
            files = {"file": ("speech.ogg", SPEECH.read_bytes())}
            found = self.http.post("/v1/audio/transcriptions", data={"model": model}, files=files)
            found.raise_for_status()
            return str(found.json()["text"])
        body = {"model": model, "prompt": prompt, "max_tokens": 4, "temperature": 0}
        found = self.http.post("/v1/completions", json=body)
        found.raise_for_status()
        return str(found.json()["choices"][0]["text"])


# --- asleep -------------------------------------------------------------------------------------


def asleep_bytes(models: Sequence[str], flags: Sequence[str]) -> tuple[int, dict[str, int]]:
    """Σ PSS of everything with all models unloaded, and of each process."""
    with served(models, *flags) as fleet:
        for model in models:
            fleet.move(model, "unloaded")
        time.sleep(1.0)
        return fleet.process.memory_bytes(), by_process(fleet.process)


def by_process(process: Process) -> dict[str, int]:
    """PSS by what a process calls itself."""
    found: Counter[str] = Counter()
    for pid in process.tree():
        name = Path(f"/proc/{pid}/comm").read_text().strip()
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        found[name] += next(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:"))
    return dict(found)


# --- wakes --------------------------------------------------------------------------------------


def wakes(fleet: Fleet, model: str, rounds: int) -> dict[str, list[float]]:
    """Seconds to the first token, by where the model was; by turns."""
    found: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds):
        for where in ("awake", "level 1", "level 2", "unloaded"):
            fleet.move(model, "awake")
            fleet.first_token_s(model, f"Warm {number} {where}")
            fleet.move(model, where)
            found[where].append(fleet.first_token_s(model, f"Round {number}, and the model was {where} before"))
    return found


# --- requests -----------------------------------------------------------------------------------


class Watch:
    """Looks every 50 ms what all engines have for themselves."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.samples: list[int] = []

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(SAMPLE_S):
            engines = [pid for pid in self._process.tree() if _comm(pid) == "shuteye-engine"]
            self.samples.append(sum(map(private_bytes, engines)))


def _comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


@dataclass
class Outcome:
    """What came of many requests; seconds to the answer by where the model was when it was asked."""

    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    most_bytes: int = 0


def mixed_requests(fleet: Fleet, count: int, clients: int, seed: int) -> Outcome:
    """Requests for models by Zipf's law, several at a time; every answer is compared with the first."""
    rng = random.Random(seed)
    weights = [1 / (rank + 1) for rank in range(len(fleet.models))]
    order = rng.sample(fleet.models, len(fleet.models))
    prompts = {model: f"Tell me about {number}" for number, model in enumerate(fleet.models)}
    expected = {model: fleet.answer(model, prompts[model]) for model in fleet.models}
    chosen = rng.choices(order, weights, k=count)
    outcome = Outcome()

    def ask(model: str) -> None:
        where = fleet.where(model)
        began = time.perf_counter()
        try:
            found = fleet.answer(model, prompts[model])
        except httpx2.HTTPError as error:
            outcome.lost.append(f"{model}: {error}")
            return
        outcome.seconds[where].append(time.perf_counter() - began)
        if found != expected[model]:
            outcome.wrong.append(f"{model}: {found!r} instead of {expected[model]!r}")

    with Watch(fleet.process) as watch, ThreadPoolExecutor(clients) as pool:
        list(pool.map(ask, chosen))
    outcome.most_bytes = max(watch.samples, default=0)
    return outcome


# --- the report ---------------------------------------------------------------------------------


def percentiles(samples: Sequence[float]) -> str:
    """P50, P95 and P99 in milliseconds."""
    ordered = sorted(samples)
    return " / ".join(f"{ordered[min(len(ordered) - 1, int(len(ordered) * p / 100))] * 1e3:,.0f}" for p in (50, 95, 99))


def main() -> None:
    """Measure what the arguments ask for, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=20, help="how many, three of them real; default 20")
    parser.add_argument("--rounds", type=int, default=7, help="of wakes; default 7")
    parser.add_argument("--requests", type=int, default=1000, help="mixed ones; default 1000, 0 for none")
    parser.add_argument("--clients", type=int, default=4, help="that ask at once; default 4")
    parser.add_argument("--budget", default="600MiB", help="for the mixed requests; default 600MiB")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    models = [*REAL, *random_models(arguments.models - len(REAL))]
    flags = ("--on-sleeping-request", "wake", "--max-kv-cache-memory", "32MiB", "--offline")

    half, _ = asleep_bytes(models[: len(models) // 2], flags)
    whole, processes = asleep_bytes(models, flags)
    each = (whole - half) / (len(models) - len(models) // 2)
    print(f"asleep: {whole / MIB:,.1f} MiB with {len(models)} models, {each / MIB:,.2f} for each further one")
    print("  " + ", ".join(f"{name} {nbytes / MIB:,.1f}" for name, nbytes in sorted(processes.items())))

    with served([REAL[0]], *flags, "--sleep-idle-seconds", "3600") as fleet:
        for where, samples in wakes(fleet, REAL[0], arguments.rounds).items():
            spread = f"{min(samples) * 1e3:,.0f}–{max(samples) * 1e3:,.0f}"
            print(f"wake to first token, {where}: {statistics.median(samples) * 1e3:,.0f} ms ({spread})")

    if arguments.requests:
        budget = parse_size(arguments.budget)
        with served(models, *flags, "--memory-budget", arguments.budget) as fleet:
            began = time.perf_counter()
            found = mixed_requests(fleet, arguments.requests, arguments.clients, arguments.seed)
            print(
                f"{arguments.requests} requests in {time.perf_counter() - began:,.0f} s: {len(found.lost)} lost, "
                f"{len(found.wrong)} wrong; most bytes {found.most_bytes / MIB:,.0f} MiB of {budget / MIB:,.0f}"
            )
            for one in (*found.lost[:5], *found.wrong[:5]):
                print("  ", one)
            for where, samples in sorted(found.seconds.items()):
                print(f"  answers where the model was {where}: {len(samples)}, P50/P95/P99 {percentiles(samples)} ms")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    ending_engines(main)
