"""Measures the native kernels beside their floors: products of every kind of matrix, attention, whole decoder steps.

Weights of SmolLM2-135M's shapes, or another's; knows nothing of engines. A and B alternate, and with them a plain
reading of the same memory; medians and minima.
"""

from __future__ import annotations

import argparse
import math
import mmap
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from machine import this_machine
from shuteye import native
from shuteye.cache.kv_cache import KVCache
from shuteye.matrices.kinds import kind_of
from shuteye.matrices.matrix import Matrix
from shuteye.models.fused import FusedDecoder, FusedSpec, FusedWeights, Layer, Projection, decoder_spec
from shuteye.native.decoder import DecoderStep, Numbers
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
            Layer(
                input_norm=take(hidden),
                qkv=Projection(take(rows, hidden), None),
                query_norm=None,
                key_norm=None,
                output=Projection(take(hidden, heads * HEAD_DIM), None),
                post_norm=take(hidden),
                gate_up=Projection(take(2 * inner, hidden), None),
                down=Projection(take(hidden, inner), None),
            )
            for _ in range(shape["layers"])
        )
        weights = FusedWeights(embedding, layers, take(hidden), Projection(embedding, None))
        facts = FusedSpec(shape["layers"], heads, kv_heads, HEAD_DIM, 1e-5, HEAD_DIM**-0.5, 1.0)
        blocks = (num_blocks, shape["layers"], 2, BLOCK_SIZE, kv_heads, HEAD_DIM)
        arena = _Anonymous(huge_pages(math.prod(blocks)).view(blocks))
        self.cache = KVCache(
            arena, num_blocks=num_blocks, num_layers=shape["layers"], block_size=BLOCK_SIZE, num_kv_heads=kv_heads,
            head_dim=HEAD_DIM, dtype=torch.bfloat16,
        )  # fmt: skip
        self.fused = FusedDecoder(facts, weights, torch.ones(HEAD_DIM // 2), (None,) * shape["layers"], native=False)
        self.native = native.NativeDecoder.create(decoder_spec(facts, weights, (None,) * shape["layers"], arena.blocks))

    def steps(self, num_sequences: int, num_new: int, context: int) -> list[Callable[[], Any]]:
        """The same step through torch and through the native decoder."""
        width = -(-context // BLOCK_SIZE)
        chunk = tuple(range(num_new))
        chunks = tuple(
            Chunk(str(index), chunk, context - num_new, tuple(range(index * width, (index + 1) * width)), True)
            for index in range(num_sequences)
        )
        batch = PackedBatch.from_plan(StepPlan(chunks), block_size=BLOCK_SIZE)
        angles = torch.ones(batch.num_tokens, HEAD_DIM).bfloat16().view(torch.uint16).numpy()
        step = DecoderStep(
            batch.input_ids.numpy(), angles, angles, batch.slots.numpy(), batch.query_starts, batch.context_lengths,
            batch.block_tables, batch.logits_indices.numpy(),
        )  # fmt: skip

        def by_torch() -> Tensor:
            return self.fused.forward(batch, self.cache).float()

        def by_native() -> Numbers:
            return self.native.forward(step)

        return [by_torch, by_native]


@dataclass(frozen=True)
class _Anonymous:
    """Stands in for a KV cache's arena."""

    blocks: Tensor

    def view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        assert (offset, shape, dtype) == (0, tuple(self.blocks.shape), self.blocks.dtype)
        return self.blocks


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


KINDS = ("rows", "bf16", "q8_0", "q4_0", "q4_k")
TOKENS = (1, 4, 8, 16, 64, 512)
FALLBACK = "q5_0"
"""For widths that are no multiple of 256, as llama-quantize has it."""
FILLING = 0x2C
"""Every byte of quantized matrices: scales are finite, numbers are in range, and nothing is denormal."""


class Products:
    """All matrices of a model's layers, of one kind, one after the other in memory."""

    def __init__(self, shape: dict[str, int], kind: str) -> None:
        hidden, inner, heads, kv_heads = (shape[name] for name in ("hidden", "intermediate", "heads", "kv_heads"))
        sizes = [(heads * HEAD_DIM, hidden), *[(kv_heads * HEAD_DIM, hidden)] * 2, (hidden, heads * HEAD_DIM)]
        sizes = [*sizes, (inner, hidden), (inner, hidden), (hidden, inner)] * shape["layers"]
        kinds = [kind_of(kind) if kind_of(kind).fits(columns) else kind_of(FALLBACK) for _, columns in sizes]
        lengths = [each.nbytes(size, "bfloat16") for each, size in zip(kinds, sizes, strict=True)]
        self.memory = huge_pages(sum(lengths) // 2).view(torch.uint8).fill_(FILLING)
        begins = [self.memory.data_ptr() + sum(lengths[:index]) for index in range(len(lengths))]
        self.matrices = [
            Matrix(each, *size, "bfloat16", begin) for each, size, begin in zip(kinds, sizes, begins, strict=True)
        ]
        self.num_weights = sum(rows * columns for rows, columns in sizes)

    def calls(self, num_tokens: int) -> tuple[Callable[[], None], Callable[[], None]]:
        """All products of so many tokens; the same by torch, which knows only `rows`."""
        inputs = {each.columns: torch.randn(num_tokens, each.columns).bfloat16() for each in self.matrices}
        outputs = {each.rows: torch.empty(num_tokens, each.rows, dtype=torch.bfloat16) for each in self.matrices}
        weights = self.memory[: self.num_weights * 2].view(torch.bfloat16)
        pieces = torch.split(weights, [each.rows * each.columns for each in self.matrices])

        def by_native() -> None:
            for each in self.matrices:
                native.linear(inputs[each.columns], each, None, outputs[each.rows])

        def by_torch() -> None:
            for each, piece in zip(self.matrices, pieces, strict=True):
                linear(inputs[each.columns], piece.view(each.rows, each.columns))

        return by_native, by_torch


def products(shape: dict[str, int], kinds: Sequence[str], rounds: int) -> Iterator[str]:
    """Milliseconds for all matrices of the layers, beside reading them once; rate of multiplications and additions."""
    heads = f"{'kind':>8} {'M':>4} {'MiB':>6} {'read ms':>16} {'native ms':>16} {'÷ read':>7} {'GFLOP/s':>8}"
    yield f"{heads} {'torch ms':>16}"
    for kind in kinds:
        whole = Products(shape, kind)
        for num_tokens in TOKENS:
            by_native, by_torch = whole.calls(num_tokens)
            calls: list[Callable[[], Any]] = [partial(native.read, whole.memory), by_native]
            calls += [by_torch] if kind == "rows" else []
            read, own, *others = alternate(calls, rounds)
            rate = 2 * whole.num_weights * num_tokens / statistics.median(own) / 1e9
            yield (
                f"{kind:>8} {num_tokens:>4} {whole.memory.nbytes / 2**20:>6.0f} {shown(read):>16} {shown(own):>16} "
                f"{ratio(own, read):>7.2f} {rate:>8.0f} {shown(others[0]) if others else '':>16}"
            )


def shown(seconds: Sequence[float]) -> str:
    """Median and best, in milliseconds."""
    return f"{statistics.median(seconds) * 1e3:7.2f} {min(seconds) * 1e3:7.2f}"


def ratio(own: Sequence[float], floor: Sequence[float]) -> float:
    """Median of the rounds' ratios: what is measured side by side shares the machine's mood."""
    return statistics.median(one / other for one, other in zip(own, floor, strict=True))


def attention(shape: dict[str, int], rounds: int) -> Iterator[str]:
    """Milliseconds of the attention of all layers, beside reading their keys and values once; rate of products."""
    yield f"{'sequences x new (context)':>26} {'read KV ms':>16} {'native ms':>16} {'÷ read':>7} {'GFLOP/s':>8}"
    heads, kv_heads, layers = shape["heads"], shape["kv_heads"], shape["layers"]
    for num_sequences, num_new, context in ((16, 1, 1024), (1, 1, 4096), (8, 1, 256), (1, 512, 512), (1, 512, 2048)):
        width = -(-context // BLOCK_SIZE)
        blocks = (num_sequences * width, layers, 2, BLOCK_SIZE, kv_heads, HEAD_DIM)
        memory = huge_pages(math.prod(blocks)).normal_()
        query = torch.randn(num_sequences * num_new, heads, HEAD_DIM).bfloat16()
        tables = [range(index * width, (index + 1) * width) for index in range(num_sequences)]
        starts = [index * num_new for index in range(num_sequences + 1)]
        one_layer = partial(
            native.paged_attention, query, memory.view(blocks), starts, [context] * num_sequences, tables,
            scale=HEAD_DIM**-0.5, out=torch.empty_like(query),
        )  # fmt: skip
        read, own = alternate([partial(native.read, memory), partial(_each_layer, one_layer, layers)], rounds)
        seen = num_sequences * sum(range(context - num_new + 1, context + 1))
        rate = 4 * seen * heads * HEAD_DIM * layers / statistics.median(own) / 1e9
        name = f"{num_sequences} x {num_new} ({context})"
        yield f"{name:>26} {shown(read):>16} {shown(own):>16} {ratio(own, read):>7.2f} {rate:>8.0f}"


def _each_layer(call: Callable[..., Any], layers: int) -> None:
    for layer in range(layers):
        call(layer=layer)


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
        read, by_torch, by_native = map(shown, times)
        yield f"{f'{num_sequences} x {num_new} ({context})':>26} {read:>16} {by_torch:>16} {by_native:>16}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=list(SHAPES), default="smollm2-135m")
    parser.add_argument("--level", default=None, help="instruction set: portable, avx2, avx512, amx")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--mapped", action="store_true", help="weights in a private file mapping, as in the engine")
    parser.add_argument("--only", choices=["products", "attention", "steps"], default=None)
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=KINDS, help=f"default {','.join(KINDS)}")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    native.set_num_threads(arguments.threads)
    if arguments.level:
        native.set_level(arguments.level)
    shape = SHAPES[arguments.model]
    parts = {
        "products": lambda: products(shape, arguments.kinds, arguments.rounds),
        "attention": lambda: attention(shape, arguments.rounds),
        "steps": lambda: whole_steps(shape, arguments.rounds, mapped=arguments.mapped),
    }
    print(f"level {native.level()}, {arguments.threads} threads, torch {torch.__version__}; {this_machine().words}")
    with torch.inference_mode():
        for name in [arguments.only] if arguments.only else parts:
            for line in parts[name]():
                print(line, flush=True)


if __name__ == "__main__":
    main()
