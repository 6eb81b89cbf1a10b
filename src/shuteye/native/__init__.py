"""Native CPU kernels: what torch does badly at small batch. Everything works without them, in torch.

Knows nothing of models, schedulers or memory: callers pass tensors. Threads: one pool per process, `set_num_threads`.
"""

from shuteye.native.decoder import MAX_TOKENS, DecoderSpec, LayerSpec, NativeDecoder, NativeGroup
from shuteye.native.kernels import linear, paged_attention, read, rms_norm, rope_and_write, silu_mul
from shuteye.native.library import (
    NativeUnavailable,
    available,
    level,
    levels,
    num_threads,
    set_level,
    set_num_threads,
    unavailable_reason,
)

__all__ = [
    "MAX_TOKENS",
    "DecoderSpec",
    "LayerSpec",
    "NativeDecoder",
    "NativeGroup",
    "NativeUnavailable",
    "available",
    "level",
    "levels",
    "linear",
    "num_threads",
    "paged_attention",
    "read",
    "rms_norm",
    "rope_and_write",
    "set_level",
    "set_num_threads",
    "silu_mul",
    "unavailable_reason",
]
