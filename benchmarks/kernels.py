"""Measures the native kernels beside torch: GB/s of a product's weights, ms of a whole decoder step.

Random weights of SmolLM2-135M's shapes, or another's; knows nothing of engines. A and B alternate; medians and minima.
"""

from __future__ import annotations

import argparse
import mmap
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from shuteye import native
from shuteye.cache.kv_cache import KVCache
from shuteye.models.flat_weights import FlatWeights
from shuteye.models.fused import FusedDecoder, FusedSpec
from shuteye.models.tensors import as_bytes
from shuteye.native import LayerSpec, matrix_of
from shuteye.tasks.generate.plans import Chunk, StepPlan
from shuteye.tasks.generate.runner import PackedBatch

BLOCK_SIZE = 16
SHAPES: dict[str, dict[str, int]] = {
    "smollm2-135m": {"hidden": 576, "layers": 30, "heads": 9, "kv_heads": 3, "intermediate": 1536, "vocab": 49152},
    "llama-1.1b": {"hidden": 2048, "layers": 22, "heads": 32, "kv_heads": 4, "intermediate": 5632, "vocab": 32000},
}
HEAD_DIM = 64


def huge_pages(numel: int) -> Tensor:
    """Zeros of bfloat16 in huge pages, as the engine's KV cache is."""
    memory = mmap.mmap(-1, numel * 2)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.bfloat16).zero_()


class Memory:
    """One arena of bfloat16, anonymous or a private mapping of a file as the engine's weights are."""

    def __init__(self, numel: int, *, mapped: bool) -> None:
        self._used = 0
        if not mapped:
            self.arena = torch.empty(numel, dtype=torch.bfloat16)
            self.arena.normal_(0, 0.02)
            return
        with tempfile.NamedTemporaryFile(dir=".") as file:
            torch.empty(numel, dtype=torch.bfloat16).normal_(0, 0.02).view(torch.int16).numpy().tofile(file.name)
            self.arena = torch.from_file(file.name, shared=False, size=numel, dtype=torch.bfloat16)

    def take(self, *shape: int) -> Tensor:
        """The next piece."""
        numel = torch.Size(shape).numel()
        piece = self.arena[self._used : self._used + numel].view(shape)
        self._used += numel
        return piece


class Whole:
    """One random model, bound both ways."""

    def __init__(self, shape: dict[str, int], *, num_blocks: int, mapped: bool) -> None:
        self.shape = shape
        hidden, inner, heads, kv_heads = (shape[name] for name in ("hidden", "intermediate", "heads", "kv_heads"))
        rows = (heads + 2 * kv_heads) * HEAD_DIM
        numel = hidden * (rows + heads * HEAD_DIM + 3 * inner + 2) * shape["layers"] + hidden * (shape["vocab"] + 1)
        self.nbytes = numel * 2
        memory = Memory(numel, mapped=mapped)
        self.memory, take = memory.arena, memory.take
        embedding = take(shape["vocab"], hidden)
        layers = tuple(
            LayerSpec(
                input_norm=take(hidden).data_ptr(),
                query=matrix_of(take(heads * HEAD_DIM, hidden)),
                key=matrix_of(take(kv_heads * HEAD_DIM, hidden)),
                value=matrix_of(take(kv_heads * HEAD_DIM, hidden)),
                output=matrix_of(take(hidden, heads * HEAD_DIM)),
                post_norm=take(hidden).data_ptr(),
                gate=matrix_of(take(inner, hidden)),
                up=matrix_of(take(inner, hidden)),
                down=matrix_of(take(hidden, inner)),
            )
            for _ in range(shape["layers"])
        )
        head, norm = matrix_of(embedding), take(hidden).data_ptr()
        weights = FlatWeights("bfloat16", hidden, layers, head, norm, head, memoryview(b""))
        facts = FusedSpec(shape["layers"], heads, kv_heads, HEAD_DIM, 1e-5, HEAD_DIM**-0.5, 1.0)
        content = huge_pages(num_blocks * shape["layers"] * 2 * BLOCK_SIZE * kv_heads * HEAD_DIM)
        self.cache = KVCache(
            _Anonymous(as_bytes(content).content), num_blocks=num_blocks, num_layers=shape["layers"],
            block_size=BLOCK_SIZE, num_kv_heads=kv_heads, head_dim=HEAD_DIM, dtype="bfloat16",
        )  # fmt: skip
        frequencies, windows = np.ones(HEAD_DIM // 2, np.float32), (None,) * shape["layers"]
        self.torch = FusedDecoder(facts, weights, frequencies, windows, native=False)
        self.native = FusedDecoder(facts, weights, frequencies, windows)

    def steps(self, num_sequences: int, num_new: int, context: int) -> list[Callable[[], Any]]:
        """The same step through torch and through the native decoder."""
        width = -(-context // BLOCK_SIZE)
        chunk = tuple(range(num_new))
        chunks = tuple(
            Chunk(str(index), chunk, context - num_new, tuple(range(index * width, (index + 1) * width)), True)
            for index in range(num_sequences)
        )
        batch = PackedBatch.from_plan(StepPlan(chunks), block_size=BLOCK_SIZE)
        return [partial(decoder.forward, batch, self.cache) for decoder in (self.torch, self.native)]


@dataclass(frozen=True)
class _Anonymous:
    """Stands in for a KV cache's arena."""

    content: memoryview

    def bytes_view(self, offset: int, nbytes: int) -> memoryview:
        assert (offset, nbytes) == (0, self.content.nbytes)
        return self.content


def alternate(calls: list[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Seconds of each call in each round, A B A B."""
    times: list[list[float]] = [[] for _ in calls]
    for round_number in range(rounds + 2):
        for call, own in zip(calls, times, strict=True):
            time.sleep(0.01)  # torch's OpenMP threads go on spinning for a while, on the cores that the next call needs
            start = time.perf_counter()
            call()
            if round_number >= 2:
                own.append(time.perf_counter() - start)
    return times


def products(rounds: int) -> Iterator[str]:
    """GB/s over weights too large for the caches of a core, many of them in turn."""
    yield f"{'M':>3} {'in -> out':>14} {'read GB/s':>16} {'torch GB/s':>16} {'native GB/s':>16}   (median, best)"
    for width, rows, copies in ((576, 3072, 30), (1536, 576, 60), (2048, 11264, 4)):
        weights = torch.empty(copies, rows, width, dtype=torch.bfloat16).normal_()
        for num_tokens in (1, 8, 16, 32, 64):
            x = torch.randn(num_tokens, width).bfloat16()
            by_torch = partial(_each_torch, x, weights)
            by_native = partial(_each_native, x, weights, torch.empty(num_tokens, rows, dtype=torch.bfloat16))
            times = alternate([partial(native.read, weights), by_torch, by_native], rounds)
            rates = [[weights.nbytes / seconds / 1e9 for seconds in own] for own in times]
            shown = [f"{statistics.median(own):7.1f} {max(own):7.1f}" for own in rates]
            yield f"{num_tokens:>3} {f'{width} -> {rows}':>14} {shown[0]:>16} {shown[1]:>16} {shown[2]:>16}"


def _each_torch(x: Tensor, weights: Tensor) -> None:
    for weight in weights:
        linear(x, weight)


def _each_native(x: Tensor, weights: Tensor, out: Tensor) -> None:
    for weight in weights:
        native.linear(x, weight, None, out)


def whole_steps(shape: dict[str, int], rounds: int, *, mapped: bool) -> Iterator[str]:
    """Milliseconds of whole steps."""
    whole = Whole(shape, num_blocks=1200, mapped=mapped)
    yield f"{whole.nbytes / 2**20:.0f} MiB of weights, {'mapped' if mapped else 'anonymous'}"
    yield f"{'sequences x new (context)':>26} {'read once ms':>16} {'torch ms':>16} {'native ms':>16}   (median, best)"
    for num_sequences, num_new, context in (
        (1, 1, 64), (1, 1, 512), (4, 1, 256), (8, 1, 256), (16, 1, 256), (16, 1, 1024), (32, 1, 256), (64, 1, 256),
        (1, 8, 64), (1, 32, 32), (1, 64, 64), (1, 64, 512), (1, 128, 128), (1, 256, 256), (1, 512, 512), (1, 512, 2048),
    ):  # fmt: skip
        times = alternate([partial(native.read, whole.memory), *whole.steps(num_sequences, num_new, context)], rounds)
        shown = [f"{statistics.median(t) * 1e3:7.2f} {min(t) * 1e3:7.2f}" for t in times]
        yield f"{f'{num_sequences} x {num_new} ({context})':>26} {shown[0]:>16} {shown[1]:>16} {shown[2]:>16}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=list(SHAPES), default="smollm2-135m")
    parser.add_argument("--level", default=None, help="instruction set: portable, avx2, avx512, amx")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--mapped", action="store_true", help="weights in a private file mapping, as in the engine")
    parser.add_argument("--only", choices=["products", "steps"], default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    native.set_num_threads(arguments.threads)
    if arguments.level:
        native.set_level(arguments.level)
    print(f"level {native.level()}, {arguments.threads} threads, torch {torch.__version__}")
    with torch.inference_mode():
        if arguments.only != "steps":
            print(*products(arguments.rounds), sep="\n")
        if arguments.only != "products":
            for line in whole_steps(SHAPES[arguments.model], arguments.rounds, mapped=arguments.mapped):
                print(line, flush=True)


if __name__ == "__main__":
    main()
