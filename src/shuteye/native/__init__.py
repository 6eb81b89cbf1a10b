"""Native CPU kernels: what torch does badly at small batch. Everything works without them, in torch.

Knows nothing of models, schedulers or memory: callers pass addresses. Threads: one pool per process, `set_num_threads`.
The kernels one by one, on torch tensors, are imported on first use: nothing else here needs torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shuteye.native.decoder import MAX_TOKENS, CacheMemory, DecoderSpec, LayerSpec, NativeDecoder, NativeGroup
from shuteye.native.library import (
    NativeUnavailable,
    available,
    identity,
    level,
    levels,
    num_threads,
    set_level,
    set_num_threads,
    unavailable_reason,
)

if TYPE_CHECKING:
    from shuteye.native.kernels import (
        embed,
        linear,
        matrix_of,
        paged_attention,
        read,
        rms_norm,
        rope_and_write,
        silu_mul,
    )

__all__ = [
    "MAX_TOKENS",
    "CacheMemory",
    "DecoderSpec",
    "LayerSpec",
    "NativeDecoder",
    "NativeGroup",
    "NativeUnavailable",
    "available",
    "embed",
    "identity",
    "level",
    "levels",
    "linear",
    "matrix_of",
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

_KERNELS = ("embed", "linear", "matrix_of", "paged_attention", "read", "rms_norm", "rope_and_write", "silu_mul")


def __getattr__(name: str) -> object:
    if name not in _KERNELS:
        raise AttributeError(f"module 'shuteye.native' has no attribute {name!r}")
    from shuteye.native import kernels

    return getattr(kernels, name)
