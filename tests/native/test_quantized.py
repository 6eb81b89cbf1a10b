"""Products with quantized matrices against the same arithmetic in float64: every kind, on odd sizes."""

import numpy as np
import pytest
import torch
from emulated import emulated_levels
from quantized_matrices import BLOCK_NAMES, NAMES, Quantized, quantized_tokens
from torch import Tensor

from shuteye import native
from shuteye.matrices.kinds import kind_of
from shuteye.matrices.matrix import Matrix
from shuteye.matrices.packing import unpack
from shuteye.native import library

LEVELS = [*(native.levels() if native.available() else ()), *(f"emulated {level}" for level in emulated_levels())]
if emulated_levels():
    LEVELS.append("emulated avx2")  # one with AVX-VNNI
pytestmark = pytest.mark.parametrize("level", LEVELS, indirect=True)

OWN_LIBRARY = library._Chosen.path
LONG_BLOCKS = [name for name in BLOCK_NAMES if kind_of(name).block_columns > 32]
SHORT_BLOCKS = [name for name in BLOCK_NAMES if name not in LONG_BLOCKS]


def tokens(count: int, width: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return (x * torch.logspace(-3, 3, width)).to(dtype)  # units of very different scales


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("rows", "columns"), [(16, 256), (45, 512)])
def test_products(level, name, rows, columns):
    """A bit, scale or column in the wrong place in any kind, or a tile of tokens that is not computed."""
    quantized = Quantized.random(name, rows, columns)
    for count in (1, 2, 3, 4, 5, 7, 8, 15, 16, 33, 64, 65, 70, 139):
        quantized.assert_linear(tokens(count, columns, seed=count))


@pytest.mark.parametrize("name", [*SHORT_BLOCKS, "int4_row_f32", "int8_row_bf16", "int4_g32_f16"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (17, 96), (33, 32), (7, 1184)])
def test_products_of_few_columns(level, name, rows, columns):
    """Blocks of 32 columns may be of any number, and no panel need be full."""
    quantized = Quantized.random(name, rows, columns)
    for count in (1, 3, 4, 18):
        quantized.assert_linear(tokens(count, columns, seed=count))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fill", [0, 255, 0x80])
def test_the_largest_numbers_do_not_overflow(level, name, fill):
    """Sums in 16 bits that are full: tokens of 127 and -127 everywhere, and weights as large as they get."""
    quantized = Quantized.random(name, 16, 512, fill=fill)
    ones = torch.ones(512)
    alternating = torch.tensor([1.0, -1.0]).repeat(256)
    x = torch.stack([ones, -ones, alternating, ones * 3e4, alternating * 1e-4])
    quantized.assert_linear(x)
    quantized.assert_linear(x.repeat(4, 1))  # tiles of AMX are full


@pytest.mark.parametrize("name", NAMES)
def test_zeros_give_zeros(level, name):
    """A unit of zeros has no scale to divide by; numbers too small to have an inverse are taken for zeros."""
    quantized = Quantized.random(name, 20, 256)
    for x in (torch.zeros(5, 256), torch.full((5, 256), 1e-38)):
        assert torch.equal(quantized.linear(x), torch.zeros(5, 20))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [1, 4, 9, 70])
def test_what_is_not_finite_stays_in_its_token(level, name, count):
    """One sequence's NaN must neither reach another's logits nor become a number."""
    quantized = Quantized.random(name, 40, 512)
    x = tokens(count, 512)
    clean = quantized.linear(x)
    for broken in (torch.nan, torch.inf, -torch.inf):
        spoiled = x.clone()
        spoiled[count // 2, 77] = broken
        found = quantized.linear(spoiled)
        assert found[count // 2].isnan().all()
        others = torch.arange(count) != count // 2
        assert torch.equal(found[others], clean[others])


@pytest.mark.parametrize("name", NAMES)
def test_a_token_has_the_same_bits_in_every_company_and_on_every_number_of_threads(level, name):
    """What a request answers would depend on what else is served, and on who came first."""
    quantized = Quantized.random(name, 130, 512)
    x = tokens(139, 512)
    whole = quantized.linear(x)
    for threads in (1, 3, 4):
        native.set_num_threads(threads)
        for count in (1, 2, 4, 7, 16, 63, 65, 139):
            assert torch.equal(quantized.linear(x[:count].contiguous()), whole[:count])
            assert torch.equal(quantized.linear(x[-count:].contiguous()), whole[-count:])


@pytest.mark.parametrize("name", NAMES)
def test_every_set_gives_the_bits_of_avx2(level, name):
    """Sums or scales in another order: a model would answer otherwise on another machine."""
    if library._Chosen.path == OWN_LIBRARY and level in {"portable", "avx2"}:
        pytest.skip("has no fused multiply-add, or is that set")
    quantized = Quantized.random(name, 45, 512)
    x = tokens(37, 512)
    found = quantized.linear(x)
    library.use_library(OWN_LIBRARY)
    native.set_level("avx2")
    assert torch.equal(found, quantized.linear(x))


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_with_a_bias(level, name):
    """Results are rounded once, after the bias, and a part of the rows has its own part of it."""
    quantized = Quantized.random(name, 45, 512)
    bias = torch.randn(45, generator=torch.Generator().manual_seed(1)).bfloat16()
    whole = quantized.matrix
    matrix = Matrix(whole.kind, whole.rows, whole.columns, "bfloat16", whole.address, bias.data_ptr())
    x = tokens(9, 512, dtype=torch.bfloat16)
    found = native.linear(x, matrix, None, torch.empty(9, 45, dtype=torch.bfloat16))
    exact = quantized_tokens(x.float().numpy()) @ quantized.weights.astype(np.float64).T + bias.double().numpy()
    torch.testing.assert_close(found.double(), torch.from_numpy(exact), rtol=2**-8, atol=1e-2)
    part = native.linear(x, whole.part(16, 45), None, torch.empty(9, 29, dtype=torch.bfloat16))
    unbiased = native.linear(x, Matrix(whole.kind, 45, 512, "bfloat16", whole.address), None, torch.empty_like(found))
    assert torch.equal(part, unbiased[:, 16:])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_rows(level, name, dtype):
    """Embeddings are the very numbers that others get from the same file, down to the sign of zero."""
    quantized = Quantized.random(name, 45, 512, seed=3)
    ids = torch.tensor([44, 0, 15, 16, 31, 32, 7])
    found = native.embed(ids, quantized.matrix, torch.empty(len(ids), 512, dtype=dtype))
    weights = unpack(quantized.matrix.kind, quantized.memory, 45, 512)
    expected = torch.from_numpy(weights)[ids].to(dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(found.view(bits), expected.view(bits))
