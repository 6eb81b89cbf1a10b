"""The compiled library: whether it can be used, with which instruction set, on how many threads.

Knows no kernel. The library is loaded on first use, never at import.
"""

from __future__ import annotations

import atexit
import ctypes
from functools import cache
from pathlib import Path
from typing import Any

from shuteye.native.build import LIBRARY
from shuteye.native.structs import ABI_VERSION, PROTOTYPES

LEVELS = ("portable", "avx2", "avx512", "amx")
"""Instruction sets, each needing the ones before it (portable: none)."""


class NativeUnavailable(RuntimeError):
    """The native library is not there or cannot be used here; the message says why. torch does the same work."""


class _Chosen:
    """Which file is loaded: the package's own, unless a test names another before first use."""

    path: Path = LIBRARY


def use_library(path: Path) -> None:
    """Load `path` instead of the package's own library; for builds with sanitizers. Call before anything else."""
    assert load.cache_info().currsize == 0, "a library is loaded already"
    _Chosen.path = path


@cache
def load() -> ctypes.CDLL:
    """The library, with all prototypes set.

    Raises:
        NativeUnavailable: there is none, it does not load, or it was built from other sources.
    """
    if not _Chosen.path.exists():
        raise NativeUnavailable(
            f"{_Chosen.path} does not exist: the package was installed without a C++ compiler. "
            "Install one (on Debian: apt install g++) and install again, or run python -m shuteye.native.build"
        )
    try:
        library = ctypes.CDLL(str(_Chosen.path))
        _declare(library)
    except (OSError, AttributeError) as error:
        raise NativeUnavailable(f"{_Chosen.path} does not load: {error}. Install again to have it rebuilt.") from error
    if library.shuteye_abi_version() != ABI_VERSION:
        raise NativeUnavailable(f"{_Chosen.path} was built from other sources. Install again to have it rebuilt.")
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
