"""The KV cache puts keys and values where the layout says, and touches nothing before."""

import pytest
import torch

from shuteye.cache.kv_cache import KVCache, kv_bytes_per_token
from shuteye.memory.arena import Arena
from shuteye.memory.backends import open_backend
from shuteye.models.kv_tensors import KVTensors
from shuteye.models.tensors import arena_view

SHAPE = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 8, "dtype": "bfloat16"}


@pytest.fixture
def arena():
    arena = Arena.reserve(open_backend("linux"), tag="kv_cache", nbytes=kv_bytes_per_token(**SHAPE) * 4 * 512)
    arena.commit()
    yield arena
    arena.close()


def test_construction_touches_no_memory(arena):
    before = arena.resident_bytes()
    KVCache(arena, num_blocks=512, block_size=4, **SHAPE)
    assert arena.resident_bytes() == before


def test_bytes_per_block_is_what_the_facts_promise(arena):
    cache = KVCache(arena, num_blocks=5, block_size=4, **SHAPE)
    assert cache.bytes_per_block == 4 * kv_bytes_per_token(**SHAPE)


def test_write_reaches_the_slots_of_one_layer_and_no_others(arena):
    cache = KVTensors(KVCache(arena, num_blocks=5, block_size=4, **SHAPE))
    slots = torch.tensor([4 * 3 + 1, 0, 4 * 4 + 3])
    keys = torch.arange(3 * 2 * 8).view(3, 2, 8).bfloat16() + 1
    cache.write(1, keys, -keys, slots)
    for layer in range(3):
        stored_keys, stored_values = cache.layer(layer)
        assert stored_keys.shape == (5, 4, 2, 8)
        expected = torch.zeros(5 * 4, 2, 8, dtype=torch.bfloat16)
        if layer == 1:
            expected[slots] = keys
        assert torch.equal(stored_keys.reshape(20, 2, 8), expected)
        assert torch.equal(stored_values.reshape(20, 2, 8), -expected)


def test_a_block_is_contiguous_over_all_layers(arena):
    """Block-major: writing one block of every layer must not touch memory outside of that block."""
    cache = KVCache(arena, num_blocks=5, block_size=4, **SHAPE)
    for layer in range(3):
        KVTensors(cache).write(
            layer, torch.ones(4, 2, 8).bfloat16(), torch.ones(4, 2, 8).bfloat16(), torch.arange(8, 12)
        )
    nbytes = cache.bytes_per_block
    whole = arena_view(arena, 0, (5 * nbytes,), "uint8")
    assert whole[2 * nbytes : 3 * nbytes].view(torch.bfloat16).eq(1).all()
    assert whole[: 2 * nbytes].eq(0).all()
    assert whole[3 * nbytes :].eq(0).all()
