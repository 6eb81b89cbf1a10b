"""What the callers' side is told of a loaded model, from what its rank found and what the config became.

Knows nothing of how either came about.
"""

from __future__ import annotations

from shuteye.config import EngineConfig
from shuteye.outputs import ModelInfo
from shuteye.plans import ModelFacts


def model_info(config: EngineConfig, facts: ModelFacts, num_blocks: int) -> ModelInfo:
    """Everything a frontend must know; `config` is complete."""
    assert config.kv_cache_memory is not None
    assert config.max_model_len is not None
    return ModelInfo(
        model=config.model,
        architecture=facts.architecture,
        task=facts.task,
        tokenizer_dir=facts.tokenizer_dir,
        image_dir=facts.image_dir,
        dtype=facts.dtype,
        vocab_size=facts.vocab_size,
        max_model_len=config.max_model_len,
        block_size=config.block_size,
        num_blocks=num_blocks,
        eos_token_ids=facts.eos_token_ids,
        weights_bytes=facts.weights_bytes,
        kv_cache_bytes=config.kv_cache_memory,
        kv_bytes_per_token=facts.kv_bytes_per_token,
        default_sampling=facts.default_sampling,
        pooling=facts.pooling,
        source=facts.source,
        source_format=facts.source_format,
    )
