"""A short text that changes whenever a checkpoint does.

Knows nothing of formats: files are names, sizes, times and sampled bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import xxhash

SAMPLE_BYTES = 64 * 1024
"""Bytes read at the start, the middle and the end of a file; smaller files are read whole."""

RELEVANT_SUFFIXES = frozenset({".safetensors", ".json", ".jinja", ".model", ".txt", ".gguf"})
"""Files that can change what is served. A README cannot."""


def fingerprint_files(root: Path, files: Iterable[Path]) -> str:
    """A digest of names (relative to `root`), sizes, modification times and sampled content, in 32 hex digits."""
    digest = xxhash.xxh3_128()
    for file in sorted(files):
        stat = file.stat()
        digest.update(f"{file.relative_to(root).as_posix()}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
        for piece in _samples(file, stat.st_size):
            digest.update(piece)
    return digest.hexdigest()


def fingerprint_path(path: Path) -> str:
    """The fingerprint of one file, or of the relevant files of a directory."""
    if path.is_file():
        return fingerprint_files(path.parent, [path])
    return fingerprint_files(path, relevant_files(path))


def relevant_files(directory: Path) -> list[Path]:
    """The files of a checkpoint directory that can change what is served."""
    modules = directory.glob("[0-9]*_*/*")  # of sentence-transformers, such as 1_Pooling/config.json
    files = [*directory.iterdir(), *modules]
    return [file for file in files if file.is_file() and file.suffix in RELEVANT_SUFFIXES]


def _samples(file: Path, size: int) -> Iterable[bytes]:
    if size <= 3 * SAMPLE_BYTES:
        yield file.read_bytes()
        return
    with file.open("rb") as stream:
        for offset in (0, (size - SAMPLE_BYTES) // 2, size - SAMPLE_BYTES):
            stream.seek(offset)
            yield stream.read(SAMPLE_BYTES)
