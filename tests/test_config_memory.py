"""The size of the KV cache, against the memory that there is."""

from __future__ import annotations

import pytest

from shuteye import EngineConfig
from shuteye.errors import MemoryExhausted
from shuteye.model_info import ModelSpec

FACTS = ModelSpec(
    architecture="Tiny",
    task="generate",
    dtype="float32",
    vocab_size=10,
    context_length=64,
    eos_token_ids=(1,),
    weights_bytes=1000,
    kv_bytes_per_token=100,
    available_bytes=2**30,
    image_dir="",
    tokenizer_dir="",
    default_sampling={},
)


def test_a_kv_cache_larger_than_memory_is_refused_by_name():
    """Would catch `reserve of 109,951,164,588,032 bytes at 0x0 failed`."""
    with pytest.raises(MemoryExhausted, match=r"109,951,162,777,600 bytes .* 1,073,741,824 are available") as refused:
        EngineConfig(kv_cache_memory=100 * 2**40).resolve(FACTS)
    assert refused.value.param == "kv_cache_memory"
    assert EngineConfig(kv_cache_memory=2**30).resolve(FACTS).kv_cache_memory <= 2**30
