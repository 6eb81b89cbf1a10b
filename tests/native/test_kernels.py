"""Each kernel against torch in float64 or in the very operations of models/fused.py, on odd sizes."""

from dataclasses import replace

import pytest
import torch
from panels import Panels
from torch import Tensor
from torch.nn import functional

from shuteye import native
from shuteye.cache.kv_cache import KVCache
from shuteye.cache.kv_layout import KVLayout
from shuteye.models.kv_tensors import KVTensors
from shuteye.models.native_loop import cache_memory

DTYPES = [torch.float32, torch.bfloat16]


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(found: Tensor, exact: Tensor, dtype: torch.dtype, *, scale: float = 1.0) -> None:
    """Within 1e-5 of float32, within one rounding of bfloat16 (and the sum's own error) otherwise."""
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(found.double(), exact.double(), rtol=tolerance, atol=tolerance * scale * 0.1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 31, 64, 80, 577])
def test_norm_rounds_as_torch_does(level, dtype, width):
    x, weight = random(5, width, dtype=dtype), random(width, dtype=dtype, seed=1)
    found = native.rms_norm(x, weight, 1e-5, torch.empty_like(x))
    expected = functional.rms_norm(x, (width,), weight, 1e-5)
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-6)
    else:
        assert (found != expected).float().mean() < 0.02  # sums in another order, rounded at a tie
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5, 8, 15, 16, 17, 33, 48, 63, 64])
@pytest.mark.parametrize(("in_features", "out_features"), [(64, 48), (33, 17), (80, 5), (576, 131), (95, 64)])
def test_linear(level, dtype, num_tokens, in_features, out_features):
    x = random(num_tokens, in_features, dtype=dtype)
    weight = random(out_features, in_features, dtype=dtype, seed=1)
    bias = random(out_features, dtype=dtype, seed=2) if num_tokens % 2 else None
    found = native.linear(x, weight, bias, torch.full((num_tokens, out_features), torch.nan, dtype=dtype))
    exact = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert_near(found, exact, dtype, scale=in_features**0.5)


@pytest.mark.parametrize("num_tokens", [65, 80, 97, 200])
@pytest.mark.parametrize(
    ("in_features", "out_features"), [(64, 48), (33, 17), (1201, 5), (600, 131), (1152, 300), (1601, 70), (3140, 40)]
)
def test_linear_of_many_tokens(level, num_tokens, in_features, out_features):
    """Depth in one chunk and in several, rows in one group and in several, and none of them full."""
    x = random(num_tokens, in_features, dtype=torch.bfloat16)
    weight = random(out_features, in_features, dtype=torch.bfloat16, seed=1)
    bias = random(out_features, dtype=torch.bfloat16, seed=2) if num_tokens % 2 else None
    found = native.linear(x, weight, bias, torch.full((num_tokens, out_features), torch.nan, dtype=torch.bfloat16))
    exact = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert_near(found, exact, torch.bfloat16, scale=in_features**0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 16, 17, 25, 33, 64, 65, 97, 200])
@pytest.mark.parametrize(
    ("in_features", "out_features"), [(64, 64), (33, 17), (80, 5), (576, 131), (95, 96), (1600, 40)]
)
def test_linear_of_panels(level, dtype, num_tokens, in_features, out_features):
    """Tiles of every shape, full and not; columns and rows that are padding; NaN around a token's own row."""
    x = random(num_tokens, in_features, dtype=dtype)
    weight = random(out_features, in_features, dtype=torch.bfloat16, seed=1)
    bias = random(out_features, dtype=dtype, seed=2) if num_tokens % 2 else None
    panels = Panels()
    matrix = replace(
        panels.of(native.matrix_of(weight)), dtype=str(dtype)[6:], bias=0 if bias is None else bias.data_ptr()
    )
    found = native.linear(x, matrix, None, torch.full((num_tokens, out_features), torch.nan, dtype=dtype))
    exact = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert_near(found, exact, dtype, scale=4 * in_features**0.5)  # a sum is one chain


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_of_panels_has_the_same_bits_in_every_company(level, dtype):
    """Sums in an order that depends on the number of tokens, or another token's NaN."""
    x = random(150, 1600, dtype=dtype)
    x[7] = torch.nan
    weight = random(70, 1600, dtype=torch.bfloat16, seed=1)
    panels = Panels()
    matrix = panels.of(native.matrix_of(weight))
    whole = native.linear(x, matrix, None, x.new_empty(150, 70))
    for first, end in ((0, 1), (1, 4), (2, 8), (5, 17), (11, 47), (30, 129)):
        found = native.linear(x[first:end], matrix, None, x.new_empty(end - first, 70))
        assert torch.equal(found.nan_to_num(9.0), whole[first:end].nan_to_num(9.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "panels"])
def test_embedding(level, dtype, packed):
    """Another row, or another column of the right one."""
    weight = random(77, 90, dtype=torch.bfloat16 if packed else dtype)
    token_ids = torch.tensor([76, 0, 31, 32, 33, 76])
    panels = Panels()
    matrix = panels.of(native.matrix_of(weight)) if packed else native.matrix_of(weight)
    found = native.embed(token_ids, matrix, torch.full((6, 90), torch.nan, dtype=dtype))
    assert torch.equal(found, weight[token_ids].to(dtype))


def test_linear_reads_nothing_beyond_the_weight(level):
    """NaN before and after the weight, and in the row past the last, must not reach the sums."""
    around = torch.full((21 + 4, 33), torch.nan, dtype=torch.bfloat16)
    weight = around[2:-2]
    weight.copy_(random(21, 33, dtype=torch.bfloat16))
    for num_tokens in (1, 7, 16, 70):
        x = random(num_tokens, 33, dtype=torch.bfloat16, seed=3)
        found = native.linear(x, weight, None, x.new_empty(num_tokens, 21))
        assert_near(found, functional.linear(x.double(), weight.double()), torch.bfloat16, scale=6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [5, 64, 131])
def test_silu_mul(level, dtype, width):
    gate_up = random(3, 2 * width, dtype=dtype) * 20  # far into both tails of exp
    gate, up = gate_up.chunk(2, dim=-1)
    expected = functional.silu(gate) * up
    found = native.silu_mul(gate_up, torch.empty_like(up, memory_format=torch.contiguous_format))
    tolerance = 2e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "normed"), [(16, False), (64, True), (80, False), (128, True)])
def test_rope_and_write(level, dtype, head_dim, normed):
    """Queries rotated in place, keys and values at their slots, everything else of the cache untouched."""
    num_heads, num_kv_heads, slots = 6, 2, torch.tensor([37, 3, 16])
    qkv = random(3, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
    angles = random(3, head_dim // 2, dtype=torch.float32, seed=1).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    norms = [random(head_dim, dtype=dtype, seed=seed) for seed in (2, 3)] if normed else [None, None]
    cache = torch.full((6, 3, 2, 8, num_kv_heads, head_dim), 7.0, dtype=dtype)
    query, key, value = (part.clone() for part in qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1))
    native.rope_and_write(qkv, cos, sin, slots, cache, layer=1, query_norm=norms[0], key_norm=norms[1], eps=1e-6)

    def rotated(x: Tensor, norm: Tensor | None) -> Tensor:
        x = x if norm is None else functional.rms_norm(x, (head_dim,), norm, 1e-6)
        signed = sin.clone()
        signed[:, : head_dim // 2].neg_()
        return torch.addcmul(x * cos[:, None], x.roll(head_dim // 2, dims=-1), signed[:, None])

    close = {"rtol": 1e-6 if dtype == torch.float32 else 2**-7, "atol": 1e-6 if dtype == torch.float32 else 2**-7}
    torch.testing.assert_close(qkv[:, :num_heads], rotated(query, norms[0]), **close)
    rows = cache[slots // 8, 1, :, slots % 8]
    torch.testing.assert_close(rows[:, 0], rotated(key, norms[1]), **close)
    assert torch.equal(rows[:, 1], value)
    assert (cache == 7.0).sum() == cache.numel() - 2 * 3 * num_kv_heads * head_dim


def reference_attention(query, cache, starts, lengths, tables, layer, scale, window):
    """One query at a time in float64, keys and values gathered."""
    group, out = query.shape[1] // cache.shape[4], torch.empty_like(query, dtype=torch.float64)
    for index, (length, table) in enumerate(zip(lengths, tables, strict=True)):
        keys, values = (cache[list(table), layer, half].flatten(0, 1).double() for half in (0, 1))
        for token in range(starts[index], starts[index + 1]):
            position = length - (starts[index + 1] - token)
            seen = slice(max(0, position + 1 - window) if window else 0, position + 1)
            own_keys, own_values = (x[seen].repeat_interleave(group, dim=1) for x in (keys, values))
            scores = torch.einsum("hd,khd->hk", query[token].double(), own_keys) * scale
            out[token] = torch.einsum("hk,khd->hd", scores.softmax(-1), own_values)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize(
    ("head_dim", "num_kv_heads", "group", "block_size"),
    [
        (16, 2, 2, 8),
        (64, 3, 3, 16),
        (80, 1, 9, 16),
        (128, 2, 1, 32),
        (64, 1, 4, 32),
        (12, 2, 5, 8),
        (96, 5, 3, 16),
        (32, 20, 2, 16),
        (64, 3, 7, 32),
        (2, 2, 3, 8),
        (34, 1, 5, 8),
        (256, 2, 2, 16),
    ],
)
def test_paged_attention(level, dtype, head_dim, num_kv_heads, group, block_size, window):
    """Decodes, chunks with an offset, whole prompts; contexts past the span and past a split; NaN past every end."""
    lengths, counts = [1, 45, 300, 65, 560], [1, 1, 70, 65, 2]
    starts = [0, *torch.tensor(counts).cumsum(0).tolist()]
    num_blocks = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(num_blocks) + 3, generator=torch.Generator().manual_seed(5)).tolist()
    tables = [tuple(order.pop() for _ in range(count)) for count in num_blocks]
    cache = torch.full((sum(num_blocks) + 3, 2, 2, block_size, num_kv_heads, head_dim), torch.nan, dtype=dtype)
    for length, table in zip(lengths, tables, strict=True):
        for position in range(length):
            row = cache[table[position // block_size], 1, :, position % block_size]
            row.copy_(random(*row.shape, dtype=dtype, seed=position))
    wide = random(starts[-1], num_kv_heads * group + 3, head_dim, dtype=dtype, seed=9)
    query = wide[:, : num_kv_heads * group]
    found = native.paged_attention(query, cache, starts, lengths, tables, layer=1, scale=head_dim**-0.5, window=window)
    exact = reference_attention(query, cache, starts, lengths, tables, 1, head_dim**-0.5, window)
    # Pairs of bfloat16 round the softmax's weights, as torch's flash attention does: relative to the values, up to 4.
    assert_near(found, exact, dtype, scale=30 if level in {"avx512", "amx"} else 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_does_not_depend_on_who_shares_the_step(level, dtype):
    """Would catch tiles cut by what else is in the batch: the canary shares steps, and must come out the same."""
    counts, lengths, tables = [1, 9, 1], [200, 9, 33], [tuple(range(13)), (13,), (14, 15, 16)]
    cache = random(17, 1, 2, 16, 3, 64, dtype=dtype)
    query = random(sum(counts), 9, 64, dtype=dtype, seed=1)
    starts = [0, *torch.tensor(counts).cumsum(0).tolist()]
    together = native.paged_attention(query, cache, starts, lengths, tables, layer=0, scale=0.125)
    for index, count in enumerate(counts):
        own = slice(starts[index], starts[index + 1])
        alone = native.paged_attention(
            query[own], cache, [0, count], [lengths[index]], [tables[index]], layer=0, scale=0.125
        )
        assert torch.equal(alone, together[own])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("course", ["rises", "falls", "leaps"])
def test_attention_over_scores_far_apart(level, dtype, course):
    """Would catch weights without room: scores that rise by 380 over a prompt, fall as far, or leap, in some rows."""
    num_tokens, num_heads, head_dim, block_size = 190, 4, 32, 16
    every = torch.arange(num_tokens)
    heights = {"rises": every, "falls": -every, "leaps": (every % 50 == 49) * every}[course]
    cache = random(12, 1, 2, block_size, 1, head_dim, dtype=dtype, seed=1)
    cache[every // block_size, 0, 0, every % block_size, 0, 0] = heights.to(dtype)
    query = random(num_tokens, num_heads, head_dim, dtype=dtype, seed=2)
    query[:, :, 0] = torch.tensor([1.0, 0.0, -1.0, 2.0], dtype=dtype)
    table = (tuple(range(12)),)
    found = native.paged_attention(query, cache, [0, num_tokens], [num_tokens], table, layer=0, scale=1.0)
    exact = reference_attention(query, cache, [0, num_tokens], [num_tokens], table, 0, 1.0, None)
    assert_near(found, exact, dtype, scale=200)


def test_attention_refuses_blocks_outside_the_cache(level):
    query, cache = torch.zeros(1, 1, 16), torch.zeros(2, 1, 2, 8, 1, 16)
    with pytest.raises(ValueError, match="names a block that the cache does not have"):
        native.paged_attention(query, cache, [0, 1], [9], [(0, 2)], layer=0, scale=1.0)


# --- caches of other dtypes than the model ---------------------------------------------------------

HELD = [(torch.float32, "bfloat16"), *((dtype, held) for dtype in DTYPES for held in ("float16", "int8"))]


class OtherCache:
    """A cache of any dtype whose numbers, or scales, are NaN until they are written."""

    def __init__(self, num_blocks: int, num_layers: int, block_size: int, heads: tuple[int, int], held: str) -> None:
        layout = KVLayout(num_layers, block_size, *heads, held)
        self.memory = torch.full((num_blocks * layout.bytes_per_block,), 0xFF, dtype=torch.uint8)
        self.cache = KVCache(self, layout, num_blocks=num_blocks)
        self.tensors = KVTensors(self.cache)
        self.native = cache_memory(self.cache)

    def bytes_view(self, offset: int, nbytes: int) -> memoryview:
        return memoryview(self.memory.numpy())[offset : offset + nbytes]

    def exact(self) -> Tensor:
        """As float64, [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]."""
        numbers = self.tensors.numbers.double()
        return numbers if self.tensors.scales is None else numbers * self.tensors.scales.mT[..., None].double()


@pytest.mark.parametrize(("dtype", "held"), HELD)
@pytest.mark.parametrize("head_dim", [4, 20, 64])
def test_other_caches_are_written_as_torch_writes_them(level, dtype, held, head_dim):
    """Bit for bit: other roundings, a head of zeros, numbers beyond half precision, some that are not finite."""
    slots = torch.tensor([37, 3, 16, 21])
    qkv = random(4, 3 + 2 * 2, head_dim, dtype=dtype) * 3
    qkv[1, 5], qkv[0, 6], qkv[2, 5, 1], qkv[3, 6, 2] = 0.0, 1e30, torch.nan, -torch.inf
    angles = random(4, head_dim // 2, dtype=torch.float32, seed=1).repeat(1, 2)
    native_cache, torch_cache = (OtherCache(6, 3, 8, (2, head_dim), held) for _ in range(2))
    native.rope_and_write(qkv, angles.cos().to(dtype), angles.sin().to(dtype), slots, native_cache.native, layer=1)
    tensors = torch_cache.tensors
    tensors.write(1, qkv[:, 3:5], qkv[:, 5:], tensors.places(slots))  # the keys were rotated in place
    assert torch.equal(native_cache.tensors.numbers.nan_to_num(7.0), tensors.numbers.nan_to_num(7.0))
    if tensors.scales is not None:
        assert torch.equal(native_cache.tensors.scales.nan_to_num(-1.0), tensors.scales.nan_to_num(-1.0))


@pytest.mark.parametrize(("dtype", "held"), HELD)
@pytest.mark.parametrize(
    ("head_dim", "num_kv_heads", "group", "block_size", "window"),
    [(64, 3, 3, 16, None), (20, 1, 9, 8, 40), (128, 2, 1, 32, None), (64, 1, 4, 6, 5), (96, 5, 7, 16, None)],
)
def test_paged_attention_over_other_caches(level, dtype, held, head_dim, num_kv_heads, group, block_size, window):
    """As `test_paged_attention`, with what the cache holds: scales of another key or head, sums that overflow."""
    lengths, counts = [1, 45, 300, 65, 560], [1, 1, 70, 65, 2]
    starts = [0, *torch.tensor(counts).cumsum(0).tolist()]
    num_blocks = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(num_blocks) + 3, generator=torch.Generator().manual_seed(5)).tolist()
    tables = [tuple(order.pop() for _ in range(count)) for count in num_blocks]
    cache = OtherCache(sum(num_blocks) + 3, 2, block_size, (num_kv_heads, head_dim), held)
    for length, table in zip(lengths, tables, strict=True):
        positions = torch.arange(length)
        slots = torch.tensor(table)[positions // block_size] * block_size + positions % block_size
        new = random(2, length, num_kv_heads, head_dim, dtype=dtype, seed=length)
        new *= random(2, length, num_kv_heads, 1, dtype=dtype, seed=length + 1)  # scales far apart
        cache.tensors.write(1, new[0], new[1], cache.tensors.places(slots))
    query = random(starts[-1], num_kv_heads * group, head_dim, dtype=dtype, seed=9)
    scale = head_dim**-0.5
    found = native.paged_attention(query, cache.native, starts, lengths, tables, layer=1, scale=scale, window=window)
    exact = reference_attention(query, cache.exact(), starts, lengths, tables, 1, scale, window)
    if dtype == torch.float32:  # weights are right to 3e-6; a query's 16 bits, to 2^-16 of its largest
        assert_near(found, exact, dtype, scale=400 if held == "int8" else 10)
    elif level in {"avx512", "amx"}:  # as in `test_paged_attention`; a prompt's keys, too, become bfloat16
        assert_near(found, exact, dtype, scale=100 if held == "int8" else 30)
    else:
        assert_near(found, exact, dtype)


def test_an_int8_value_that_is_not_finite_shows(level):
    """A damaged value of which attention makes a finite number, in a row that sees it."""
    for num_new in (1, 40):
        cache = OtherCache(4, 1, 16, (2, 64), "int8")
        new = random(2, 50, 2, 64, dtype=torch.bfloat16)
        new[1, 45, 1, 3] = torch.nan
        cache.tensors.write(0, new[0], new[1], cache.tensors.places(torch.arange(50)))
        query = random(num_new, 6, 64, dtype=torch.bfloat16, seed=1)
        found = native.paged_attention(query, cache.native, [0, num_new], [50], [(0, 1, 2, 3)], layer=0, scale=0.125)
        assert found[-5:, 3:, 3].isnan().all()
        assert found[:, :3].isfinite().all()  # of the other KV head
