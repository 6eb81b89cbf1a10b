"""The compiled library and its structs: whether it can be used, with which instruction set, on how many threads.

The library is loaded on first use, never at import.
"""

from __future__ import annotations

import atexit
import ctypes
from ctypes import POINTER, Structure, c_char, c_double, c_int64, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

from shuteye.native.build import LIBRARY

LEVELS = ("portable", "avx2", "avx512", "amx")
"""Instruction sets, each needing the ones before it (portable: none)."""

DTYPES = {"float32": 0, "bfloat16": 1}
"""What the kernels compute with, and the number csrc/types.h gives it."""

CACHE_DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3}
"""What a KV cache may hold, likewise; float32 for models of float32 alone."""


class NativeUnavailable(RuntimeError):
    """The native library is not there or cannot be used here; the message says why. torch does the same work."""


class _Chosen:
    """Which file is loaded: the package's own, unless a test names another."""

    path: Path = LIBRARY


def use_library(path: Path) -> None:
    """Call `path` from now on instead of the package's own library: for tests, of builds of other kinds.

    What was made by one library is of no use to another.
    """
    _Chosen.path = path


def load() -> ctypes.CDLL:
    """The library, with all prototypes set.

    Raises:
        NativeUnavailable: there is none, it does not load, or it was built from other sources.
    """
    return _open(_Chosen.path)


@cache
def _open(path: Path) -> ctypes.CDLL:
    if not path.exists():
        raise NativeUnavailable(
            f"{path} does not exist: the package was installed without a C++ compiler. "
            "Install one (on Debian: apt install g++) and install again, or run python -m shuteye.native.build"
        )
    try:
        library = ctypes.CDLL(str(path))
        _declare(library)
    except (OSError, AttributeError) as error:
        raise NativeUnavailable(f"{path} does not load: {error}. Install again to have it rebuilt.") from error
    if library.shuteye_abi_version() != ABI_VERSION:
        raise NativeUnavailable(f"{path} was built from other sources. Install again to have it rebuilt.")
    atexit.register(library.shuteye_stop)
    return library


def _declare(library: ctypes.CDLL) -> None:
    for name, (result, arguments) in PROTOTYPES.items():
        function: Any = getattr(library, name)
        function.restype = result
        function.argtypes = arguments


def unavailable_reason() -> str | None:
    """Why the library cannot be used; None if it can."""
    try:
        load()
    except NativeUnavailable as error:
        return str(error)
    return None


def available() -> bool:
    """Whether the library can be used here; `unavailable_reason` says why not."""
    return unavailable_reason() is None


def identity() -> str:
    """A text that changes with the library's file, and with the instruction set in use."""
    found = _Chosen.path.stat()
    return f"{found.st_size}-{found.st_mtime_ns}-{level()}"


def levels() -> tuple[str, ...]:
    """The instruction sets that can run here, of `LEVELS`."""
    library = load()
    return tuple(name for index, name in enumerate(LEVELS) if library.shuteye_level_supported(index))


def level() -> str:
    """The instruction set in use; at first the last of `levels()`."""
    return LEVELS[load().shuteye_level()]


def set_level(name: str) -> None:
    """Use another instruction set from the next call on, in the whole process.

    Raises:
        ValueError: it is unknown, or cannot run here.
    """
    if name not in LEVELS or not load().shuteye_set_level(LEVELS.index(name)):
        raise ValueError(f"{name!r} cannot run here; one of {', '.join(levels())} can")


def num_threads() -> int:
    """Threads that share the work, the caller included; 1 at first."""
    return int(load().shuteye_num_threads())


def set_num_threads(count: int) -> None:
    """Share work among `count` threads (at most 64), the caller included; workers start on first use.

    After a fork the child starts its own. Workers sleep when idle.
    """
    load().shuteye_set_num_threads(count)


def _int64s(*names: str) -> list[tuple[str, type[c_int64]]]:
    return [(name, c_int64) for name in names]


def _pointers(*names: str) -> list[tuple[str, type[c_void_p]]]:
    return [(name, c_void_p) for name in names]


class Matrix(Structure):
    """A weight matrix; without `data` there is none."""

    _fields_ = (
        ("data", c_void_p),
        *_int64s("kind", "rows", "columns", "group", "scale_dtype", "has_zeros"),
        ("bias", c_void_p),
    )


def _matrices(*names: str) -> list[tuple[str, type[Matrix]]]:
    return [(name, Matrix) for name in names]


class Layer(Structure):
    """Weights of one layer."""

    _fields_ = (
        *_pointers("input_norm"),
        *_matrices("query", "key", "value"),
        *_pointers("query_norm", "key_norm"),
        *_matrices("output"),
        *_pointers("post_norm"),
        *_matrices("gate", "up", "down"),
        ("window", c_int64),
    )


class Cache(Structure):
    """Where the KV cache is, and its shape."""

    _fields_ = (
        ("base", c_void_p),
        *_int64s("dtype", "num_blocks", "num_layers", "block_size", "num_kv_heads", "head_dim"),
    )


class Model(Structure):
    """A decoder, or one rank's part of it."""

    _fields_ = (
        *_int64s("dtype", "hidden", "num_layers", "num_heads", "intermediate", "max_tokens"),
        ("eps", c_double),
        ("scale", c_double),
        ("embedding", Matrix),
        *_pointers("final_norm"),
        ("head", Matrix),
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
    """One step's input and where its result goes."""

    _fields_ = (
        *_int64s("num_tokens", "num_sampled"),
        *_pointers("token_ids", "cos", "sin", "slots", "wanted", "logits"),
        ("sequences", Sequences),
        *_pointers("hidden_in", "hidden_out", "group"),
        *_int64s("aborted"),
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


class Reduce(Structure):
    """Arguments of `shuteye_group_reduce`."""

    _fields_ = (
        *_int64s("dtype", "part_dtype", "rows", "width"),
        *_pointers("part", "bias", "residual", "residual_rows", "out"),
    )


class Fault(Structure):
    """Why a group was aborted, and by which rank."""

    _fields_ = (("by", c_int64), ("missing", c_uint64), ("reason", c_char * 496))


class Region(Structure):
    """What the memory of a group begins with."""

    _fields_ = (
        ("magic", c_uint64),
        *_int64s("version", "epoch", "size", "slot_bytes", "message_bytes", "nbytes"),
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
    "shuteye_linear": (None, (c_int64, c_void_p, POINTER(Matrix), c_void_p, c_int64)),
    "shuteye_embed": (None, (c_int64, POINTER(Matrix), c_void_p, c_int64, c_void_p)),
    "shuteye_rope_and_write": (None, (POINTER(Rope),)),
    "shuteye_paged_attention": (ctypes.c_char_p, (POINTER(Attention), c_int64)),
    "shuteye_region_bytes": (c_int64, (c_int64, c_int64, c_int64)),
    "shuteye_region_format": (None, (c_void_p, c_int64, c_int64, c_int64, c_int64)),
    "shuteye_region_check": (ctypes.c_char_p, (c_void_p, c_int64)),
    "shuteye_region_take_seat": (c_int64, (c_void_p, c_int64)),
    "shuteye_group_create": (c_void_p, (c_void_p, c_int64)),
    "shuteye_group_destroy": (None, (c_void_p,)),
    "shuteye_group_set_timeout": (None, (c_void_p, c_double)),
    "shuteye_group_abort": (None, (c_void_p, ctypes.c_char_p)),
    "shuteye_group_fault": (c_int64, (c_void_p, POINTER(Fault))),
    "shuteye_group_barrier": (c_int64, (c_void_p,)),
    "shuteye_group_reduce": (c_int64, (c_void_p, POINTER(Reduce))),
    "shuteye_group_gather": (c_int64, (c_void_p, c_void_p, c_int64, POINTER(c_int64), c_int64, c_void_p)),
    "shuteye_group_send": (c_int64, (c_void_p, c_void_p, c_int64, c_int64)),
    "shuteye_group_receive": (c_int64, (c_void_p, c_void_p, c_int64, c_int64)),
}
"""Result and arguments of every function of csrc/api.cpp."""
ABI_VERSION = 6
