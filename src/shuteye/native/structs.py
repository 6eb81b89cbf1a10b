"""The structs of csrc/types.h for ctypes, field by field.

Knows nothing of what is done with them.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_double, c_int64, c_void_p


def _int64s(*names: str) -> list[tuple[str, type[c_int64]]]:
    return [(name, c_int64) for name in names]


def _pointers(*names: str) -> list[tuple[str, type[c_void_p]]]:
    return [(name, c_void_p) for name in names]


class Layer(Structure):
    """Weights of one layer."""

    _fields_ = (
        *_pointers("input_norm", "qkv_weight", "qkv_bias", "query_norm", "key_norm", "output_weight", "output_bias"),
        *_pointers("post_norm", "gate_up_weight", "gate_up_bias", "down_weight", "down_bias"),
        ("window", c_int64),
    )


class Cache(Structure):
    """Where the KV cache is, and its shape."""

    _fields_ = (
        ("base", c_void_p),
        *_int64s("num_blocks", "num_layers", "block_size", "num_kv_heads", "head_dim"),
    )


class Model(Structure):
    """A decoder."""

    _fields_ = (
        *_int64s("dtype", "hidden", "num_layers", "num_heads", "intermediate", "vocab", "max_tokens"),
        ("eps", c_double),
        ("scale", c_double),
        *_pointers("embedding", "final_norm", "head_weight", "head_bias"),
        ("layers", POINTER(Layer)),
        ("cache", Cache),
    )


class Sequences(Structure):
    """Which tokens, contexts and blocks belong to which sequence."""

    _fields_ = (
        ("num_sequences", c_int64),
        *_pointers("query_starts", "context_lengths", "table_starts", "tables"),
    )


class Step(Structure):
    """One step's input and where its logits go."""

    _fields_ = (
        *_int64s("num_tokens", "num_sampled"),
        *_pointers("token_ids", "cos", "sin", "slots", "wanted", "logits"),
        ("sequences", Sequences),
    )


class Rope(Structure):
    """Arguments of `shuteye_rope_and_write`."""

    _fields_ = (
        *_int64s("dtype", "num_tokens", "num_heads", "layer"),
        ("eps", c_double),
        *_pointers("qkv", "query_norm", "key_norm", "cos", "sin", "slots"),
        ("cache", Cache),
    )


class Attention(Structure):
    """Arguments of `shuteye_paged_attention`."""

    _fields_ = (
        *_int64s("dtype", "num_heads", "query_stride", "layer", "window"),
        ("scale", c_double),
        *_pointers("query", "out"),
        ("cache", Cache),
        ("sequences", Sequences),
        *_int64s("packs_out"),
    )


PROTOTYPES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "shuteye_abi_version": (c_int64, ()),
    "shuteye_level_supported": (c_int64, (c_int64,)),
    "shuteye_level": (c_int64, ()),
    "shuteye_set_level": (c_int64, (c_int64,)),
    "shuteye_num_threads": (c_int64, ()),
    "shuteye_set_num_threads": (None, (c_int64,)),
    "shuteye_stop": (None, ()),
    "shuteye_decoder_create": (c_void_p, (POINTER(Model),)),
    "shuteye_decoder_destroy": (None, (c_void_p,)),
    "shuteye_decoder_run": (ctypes.c_char_p, (c_void_p, POINTER(Step))),
    "shuteye_read": (c_int64, (c_void_p, c_int64)),
    "shuteye_rms_norm": (None, (c_int64, c_void_p, c_void_p, c_double, c_void_p, c_int64, c_int64)),
    "shuteye_silu_mul": (None, (c_int64, c_void_p, c_void_p, c_int64, c_int64)),
    "shuteye_linear": (None, (c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64)),
    "shuteye_rope_and_write": (None, (POINTER(Rope),)),
    "shuteye_paged_attention": (ctypes.c_char_p, (POINTER(Attention), c_int64)),
}
"""Result and arguments of every function of csrc/api.cpp."""
ABI_VERSION = 2
