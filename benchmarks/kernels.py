"""Measures the native kernels beside their floors: products of every kind of matrix, attention, whole decoder steps.

Weights of SmolLM2-135M's shapes, or another's; knows nothing of engines. A and B alternate, and with them a plain
reading of the same memory; medians and minima.
"""

from __future__ import annotations

import argparse
import mmap
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from machine import this_machine
from shuteye import native
from shuteye.cache.kv_cache import KVCache
from shuteye.cache.kv_layout import KVLayout
from shuteye.matrices.kinds import ROWS, kind_of
from shuteye.matrices.matrix import Matrix
from shuteye.models.flat_weights import FlatWeights
from shuteye.models.fused import FusedDecoder, FusedSpec
from shuteye.models.kv_tensors import KVTensors
from shuteye.models.native_loop import cache_memory
from shuteye.models.tensors import as_bytes
from shuteye.native import LayerSpec
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


STEPS = (
    (1, 1, 64), (1, 1, 512), (4, 1, 256), (8, 1, 256), (16, 1, 256), (16, 1, 1024), (32, 1, 256), (64, 1, 256),
    (1, 8, 64), (1, 32, 32), (1, 64, 64), (1, 64, 512), (1, 128, 128), (1, 256, 256), (1, 512, 512), (1, 512, 2048),
)  # fmt: skip
"""Sequences, new tokens of each, and its context with them."""
KINDS = ("rows", "bf16", "q8_0", "q4_0", "q4_k")
CACHES = ("bfloat16", "float16", "int8")
TOKENS = (1, 4, 8, 16, 64, 512)
FALLBACK = "q5_0"
"""For widths that are no multiple of 256, as llama-quantize has it."""
FILLING = 0x2C
"""Every byte of every matrix: scales are finite, numbers are in range, and nothing becomes denormal."""
ALIGNMENT = 64


class Weights:
    """A model's matrices of one kind, layer after layer in memory, the embedding behind them; its norms are ones.

    Args:
        mapped: in a private mapping of a file, as the engine's are, rather than in anonymous memory.
    """

    def __init__(self, shape: dict[str, int], kind: str, *, mapped: bool = False) -> None:
        hidden, inner, queries = shape["hidden"], shape["intermediate"], shape["heads"] * HEAD_DIM
        keys = shape["kv_heads"] * HEAD_DIM
        sizes = {"query": (queries, hidden), "key": (keys, hidden), "value": (keys, hidden)}
        sizes |= {"output": (hidden, queries), "gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        kinds = {each: kind_of(kind if kind_of(kind).fits(each) else FALLBACK) for each in (hidden, inner, queries)}
        numbers = [*sizes.values()] * shape["layers"] + [(shape["vocab"], hidden)]
        ends = [0]
        for rows, columns in numbers:
            nbytes = kinds[columns].nbytes((rows, columns), "bfloat16")
            ends.append(ends[-1] + -(-nbytes // ALIGNMENT) * ALIGNMENT)
        self.memory = _filled(ends[-1], mapped=mapped)
        base = self.memory.data_ptr()
        placed = [
            Matrix(kinds[columns], rows, columns, "bfloat16", base + begin)
            for (rows, columns), begin in zip(numbers, ends[:-1], strict=True)
        ]
        self.of_layers, self.embedding = placed[:-1], placed[-1]
        self.layers_memory = self.memory[: ends[-2]]
        self._ones = torch.ones(hidden, dtype=torch.bfloat16)
        self.norm = self._ones.data_ptr()
        count = len(sizes)
        self.layers = [self._layer(*placed[begin : begin + count]) for begin in range(0, len(placed) - 1, count)]

    def _layer(self, *each: Matrix) -> LayerSpec:
        query, key, value, output, gate, up, down = each
        return LayerSpec(
            input_norm=self.norm, query=query, key=key, value=value, output=output,
            post_norm=self.norm, gate=gate, up=up, down=down,
        )  # fmt: skip

    @property
    def num_weights(self) -> int:
        """Of the layers."""
        return sum(each.rows * each.columns for each in self.of_layers)


def _filled(nbytes: int, *, mapped: bool) -> Tensor:
    memory = huge_pages(-(-nbytes // 2)).view(torch.uint8)[:nbytes].fill_(FILLING)
    if not mapped:
        return memory
    with tempfile.NamedTemporaryFile(dir=".") as file:
        memory.numpy().tofile(file.name)
        return torch.from_file(file.name, shared=False, size=nbytes, dtype=torch.uint8)


class Whole:
    """One model, bound to the native kernels, and to torch, which knows only `rows`."""

    def __init__(self, shape: dict[str, int], kind: str, *, num_blocks: int, mapped: bool) -> None:
        own = Weights(shape, kind, mapped=mapped)
        self.memory, self._weights = own.memory, own
        weights = FlatWeights(
            "bfloat16", shape["hidden"], tuple(own.layers), own.embedding, own.norm, own.embedding, memoryview(b"")
        )
        heads, kv_heads = shape["heads"], shape["kv_heads"]
        facts = FusedSpec(shape["layers"], heads, kv_heads, HEAD_DIM, 1e-5, HEAD_DIM**-0.5, 1.0)
        self.cache = empty_cache(shape, num_blocks, "bfloat16")
        frequencies, windows = np.ones(HEAD_DIM // 2, np.float32), (None,) * shape["layers"]
        self._decoders = [FusedDecoder(facts, weights, frequencies, windows)]
        if kind == "rows":
            self._decoders.append(FusedDecoder(facts, weights, frequencies, windows, native=False))

    def steps(self, num_sequences: int, num_new: int, context: int) -> list[Callable[[], Any]]:
        """The same step through the native decoder and, of `rows`, through torch."""
        width = -(-context // BLOCK_SIZE)
        chunk = tuple(range(num_new))
        chunks = tuple(
            Chunk(str(index), chunk, context - num_new, tuple(range(index * width, (index + 1) * width)), True)
            for index in range(num_sequences)
        )
        batch = PackedBatch.from_plan(StepPlan(chunks), block_size=BLOCK_SIZE)
        return [partial(decoder.forward, batch, self.cache) for decoder in self._decoders]


def empty_cache(shape: dict[str, int], num_blocks: int, dtype: str) -> KVCache:
    """A KV cache of zeros, in huge pages."""
    layout = KVLayout(shape["layers"], BLOCK_SIZE, shape["kv_heads"], HEAD_DIM, dtype)
    content = huge_pages(-(-num_blocks * layout.bytes_per_block // 2))
    return KVCache(
        _Anonymous(as_bytes(content).content[: num_blocks * layout.bytes_per_block]), layout, num_blocks=num_blocks
    )


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


def product_calls(weights: Weights, num_tokens: int) -> list[Callable[[], Any]]:
    """Reading the layers' matrices once, all products of so many tokens and, of `rows`, the same by torch."""
    matrices = weights.of_layers
    inputs = {each.columns: torch.randn(num_tokens, each.columns).bfloat16() for each in matrices}
    outputs = {each.rows: torch.empty(num_tokens, each.rows, dtype=torch.bfloat16) for each in matrices}

    def by_native() -> None:
        for each in matrices:
            native.linear(inputs[each.columns], each, None, outputs[each.rows])

    calls: list[Callable[[], Any]] = [partial(native.read, weights.layers_memory), by_native]
    if matrices[0].kind != ROWS:
        return calls
    pieces = torch.split(weights.layers_memory.view(torch.bfloat16), [each.rows * each.columns for each in matrices])

    def by_torch() -> None:
        for each, piece in zip(matrices, pieces, strict=True):
            linear(inputs[each.columns], piece.view(each.rows, each.columns))

    return [*calls, by_torch]


def products(shape: dict[str, int], kinds: Sequence[str], rounds: int) -> Iterator[str]:
    """Milliseconds for all matrices of the layers, beside reading them once; rate of multiplications and additions."""
    heads = f"{'kind':>8} {'M':>4} {'MiB':>6} {'read ms':>16} {'native ms':>16} {'÷ read':>7} {'GFLOP/s':>8}"
    yield f"{heads} {'torch ms':>16}"
    for kind in kinds:
        weights = Weights(shape, kind)
        for num_tokens in TOKENS:
            read, own, *others = alternate(product_calls(weights, num_tokens), rounds)
            rate = 2 * weights.num_weights * num_tokens / statistics.median(own) / 1e9
            yield (
                f"{kind:>8} {num_tokens:>4} {weights.layers_memory.nbytes / 2**20:>6.0f} {shown(read):>16} "
                f"{shown(own):>16} {ratio(own, read):>7.2f} {rate:>8.0f} {shown(others[0]) if others else '':>16}"
            )


def shown(seconds: Sequence[float]) -> str:
    """Median and best, in milliseconds."""
    return f"{statistics.median(seconds) * 1e3:7.2f} {min(seconds) * 1e3:7.2f}"


def ratio(own: Sequence[float], floor: Sequence[float]) -> float:
    """Median of the rounds' ratios: what is measured side by side shares the machine's mood."""
    return statistics.median(one / other for one, other in zip(own, floor, strict=True))


def attention(shape: dict[str, int], caches: Sequence[str], rounds: int) -> Iterator[str]:
    """Milliseconds of the attention of all layers, beside reading their keys and values once; rate of products."""
    columns = f"{'cache':>8} {'sequences x new (context)':>26} {'read KV ms':>16} {'native ms':>16}"
    yield f"{columns} {'÷ read':>7} {'GFLOP/s':>8}"
    heads, layers = shape["heads"], shape["layers"]
    for num_sequences, num_new, context in ((16, 1, 1024), (1, 1, 4096), (8, 1, 256), (1, 512, 512), (1, 512, 2048)):
        width = -(-context // BLOCK_SIZE)
        query = torch.randn(num_sequences * num_new, heads, HEAD_DIM).bfloat16()
        tables = [range(index * width, (index + 1) * width) for index in range(num_sequences)]
        starts = [index * num_new for index in range(num_sequences + 1)]
        calls: list[Callable[[], Any]] = []
        for dtype in caches:
            cache = empty_cache(shape, num_sequences * width, dtype)
            tensors = KVTensors(cache)
            tensors.numbers.copy_(torch.randn(tensors.numbers.shape) * (40 if tensors.scales is not None else 1))
            if tensors.scales is not None:
                tensors.scales.fill_(1 / 40)
            one_layer = partial(
                native.paged_attention, query, cache_memory(cache), starts, [context] * num_sequences, tables,
                scale=HEAD_DIM**-0.5, out=torch.empty_like(query),
            )  # fmt: skip
            memory = torch.frombuffer(cache.content, dtype=torch.uint8)
            calls += [partial(native.read, memory), partial(_each_layer, one_layer, layers)]
        times = alternate(calls, rounds)
        seen = num_sequences * sum(range(context - num_new + 1, context + 1))
        name = f"{num_sequences} x {num_new} ({context})"
        for dtype, read, own in zip(caches, times[::2], times[1::2], strict=True):
            rate = 4 * seen * heads * HEAD_DIM * layers / statistics.median(own) / 1e9
            yield f"{dtype:>8} {name:>26} {shown(read):>16} {shown(own):>16} {ratio(own, read):>7.2f} {rate:>8.0f}"


def _each_layer(call: Callable[..., Any], layers: int) -> None:
    for layer in range(layers):
        call(layer=layer)


def whole_steps(shape: dict[str, int], kinds: Sequence[str], rounds: int, *, mapped: bool) -> Iterator[str]:
    """Milliseconds of whole steps, beside reading all weights once."""
    heads = f"{'kind':>8} {'sequences x new (context)':>26} {'read ms':>16} {'native ms':>16} {'÷ read':>7}"
    yield f"{heads} {'torch ms':>16}   {'mapped' if mapped else 'anonymous'}"
    for kind in kinds:
        whole = Whole(shape, kind, num_blocks=1200, mapped=mapped)
        for num_sequences, num_new, context in STEPS:
            calls: list[Callable[[], Any]] = [partial(native.read, whole.memory)]
            calls += whole.steps(num_sequences, num_new, context)
            read, own, *others = alternate(calls, rounds)
            name = f"{kind:>8} {f'{num_sequences} x {num_new} ({context})':>26}"
            by_torch = shown(others[0]) if others else ""
            yield f"{name} {shown(read):>16} {shown(own):>16} {ratio(own, read):>7.2f} {by_torch:>16}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=list(SHAPES), default="smollm2-135m")
    parser.add_argument("--level", default=None, help="instruction set: portable, avx2, avx512, amx")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--mapped", action="store_true", help="weights in a private file mapping, as in the engine")
    parser.add_argument("--only", choices=["products", "attention", "steps"], default=None)
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=KINDS, help=f"default {','.join(KINDS)}")
    parser.add_argument(
        "--caches", type=lambda text: text.split(","), default=CACHES, help=f"of attention; default {','.join(CACHES)}"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    native.set_num_threads(arguments.threads)
    if arguments.level:
        native.set_level(arguments.level)
    shape = SHAPES[arguments.model]
    parts = {
        "products": lambda: products(shape, arguments.kinds, arguments.rounds),
        "attention": lambda: attention(shape, arguments.caches, arguments.rounds),
        "steps": lambda: whole_steps(shape, arguments.kinds, arguments.rounds, mapped=arguments.mapped),
    }
    print(f"level {native.level()}, {arguments.threads} threads, torch {torch.__version__}; {this_machine().words}")
    with torch.inference_mode():
        for name in [arguments.only] if arguments.only else parts:
            for line in parts[name]():
                print(line, flush=True)


if __name__ == "__main__":
    main()
