"""The KV cache puts keys and values where the layout says, and touches nothing before."""

import pytest
import torch

from shuteye.cache.kv_cache import KVCache
from shuteye.cache.kv_layout import KVLayout
from shuteye.errors import InvalidRequest
from shuteye.memory.arena import Arena
from shuteye.memory.backends import open_backend
from shuteye.models.kv_tensors import KVTensors, quantized
from shuteye.models.tensors import arena_view

LAYOUTS = {dtype: KVLayout(3, 4, 2, 8, dtype) for dtype in ("bfloat16", "int8")}


@pytest.fixture
def arena():
    nbytes = LAYOUTS["bfloat16"].bytes_per_block * 512
    arena = Arena.reserve(open_backend("linux"), tag="kv_cache", nbytes=nbytes)
    arena.commit()
    yield arena
    arena.close()


def test_construction_touches_no_memory(arena):
    before = arena.resident_bytes()
    KVCache(arena, LAYOUTS["bfloat16"], num_blocks=512)
    assert arena.resident_bytes() == before


def test_int8_takes_a_byte_a_number_and_a_scale_a_head():
    """Blocks that overlap, or fewer of them than the memory holds."""
    plain, whole = LAYOUTS["bfloat16"], LAYOUTS["int8"]
    assert plain.bytes_per_token == 3 * 2 * 2 * 8 * 2
    assert whole.bytes_per_token == 3 * 2 * 2 * (8 + 4)
    assert whole.bytes_per_block == 4 * whole.bytes_per_token
    for head_dim in (6, 516):
        with pytest.raises(InvalidRequest, match=f"have {head_dim}"):
            KVLayout(3, 4, 2, head_dim, "int8")


@pytest.mark.parametrize("dtype", LAYOUTS)
def test_write_reaches_the_slots_of_one_layer_and_no_others(arena, dtype):
    cache = KVTensors(KVCache(arena, LAYOUTS[dtype], num_blocks=5))
    slots = torch.tensor([4 * 3 + 1, 0, 4 * 4 + 3])
    keys = torch.arange(3 * 2 * 8).view(3, 2, 8).bfloat16() + 1
    kept, kept_values = cache.write(1, keys, -keys, cache.places(slots))
    assert torch.equal(kept_values, -kept)
    torch.testing.assert_close(kept, keys, rtol=2**-7, atol=48 / 254 if dtype == "int8" else 0)
    every = torch.arange(5)
    for layer in range(3):
        for half, sign in ((0, 1), (1, -1)):
            found = cache.read(layer, half, every, past_end=torch.tensor([], dtype=torch.int64), room=cache.room(5))
            expected = torch.zeros(5 * 4, 2, 8, dtype=torch.bfloat16)
            if layer == 1:
                expected[slots] = sign * kept
            assert torch.equal(found.bfloat16(), expected)


def test_int8_tells_what_it_cannot_hold():
    """A number that is not finite and comes back as one that is; zeros, and what is nearly zero, that become NaN."""
    heads = torch.tensor([[0.0, 0.0], [1e-38, 0.0], [torch.inf, 1.0], [torch.nan, 1.0], [-3.0, 1.0]])
    numbers, scales = quantized(heads)
    assert torch.equal(scales[:2], torch.zeros(2))
    assert scales[2:4].isnan().all()
    assert numbers[:4].eq(0).all()
    assert numbers[4].tolist() == [-127, 42]


@pytest.mark.parametrize("dtype", LAYOUTS)
def test_a_block_is_contiguous_over_all_layers(arena, dtype):
    """Block-major: writing one block of every layer must not touch memory outside of that block."""
    layout = LAYOUTS[dtype]
    cache = KVTensors(KVCache(arena, layout, num_blocks=5))
    ones = torch.ones(4, 2, 8).bfloat16()
    for layer in range(3):
        cache.write(layer, ones, ones, cache.places(torch.arange(8, 12)))
    nbytes = layout.bytes_per_block
    whole = arena_view(arena, 0, (5 * nbytes,), "uint8")
    held = 1 if dtype == "bfloat16" else 127
    assert cache.numbers[2].eq(held).all()
    assert whole[2 * nbytes : 3 * nbytes].ne(0).sum() >= cache.numbers[2].numel()
    assert whole[: 2 * nbytes].eq(0).all()
    assert whole[3 * nbytes :].eq(0).all()
