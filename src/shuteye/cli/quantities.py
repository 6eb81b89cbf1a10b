"""Sizes, times and integers as people write them, read and written."""

from __future__ import annotations

import re

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", start=1)}
_UNITS |= {letter: 1024**power for power, letter in enumerate("kmgt", start=1)}  # as docker and systemd read them

_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?(?:e\+?\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes from `512MiB`, `2GiB`, `1.5GB`, `64M`, `1e9` or `1073741824`.

    Raises:
        ValueError: it is none of these, or no whole number of bytes.
    """
    match = _SIZE.fullmatch(text.replace("_", ""))
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ValueError(f"{text!r} is not a size; write it as 512MiB, 2GiB, 1.5GB, 1e9 or plain bytes.")
    nbytes = float(match[1]) * unit
    if not nbytes.is_integer():
        raise ValueError(f"{text!r} is {nbytes} bytes, which is not a whole number.")
    return int(nbytes)


def parse_integer(text: str) -> int:
    """An integer in digits, which may have `_` between them, or in Python's notation for hex, octal and binary.

    Raises:
        ValueError: it is none; nothing is rounded.
    """
    try:
        return int(text) if text.strip("+-0123456789_ ") == "" else int(text, base=0)
    except ValueError as error:
        raise ValueError(f"{text!r} is not an integer.") from error


def format_size(nbytes: int) -> str:
    """Bytes as MiB, or as what they are below one of them."""
    if nbytes < 1024:
        return f"{nbytes} B"
    if nbytes < 1024**2:
        return f"{nbytes / 1024:.1f} KiB"
    return f"{nbytes / 1024**2:,.1f} MiB"


def format_seconds(seconds: float) -> str:
    """Milliseconds below ten seconds, seconds above."""
    return f"{seconds * 1000:,.1f} ms" if seconds < 10 else f"{seconds:,.1f} s"
