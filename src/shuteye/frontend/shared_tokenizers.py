"""The tokenizers of all models that this process serves: files of the same content are read once, and held once.

One of fifty thousand tokens takes a tenth of a second to read, and 15 MiB for as long as anybody has it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from weakref import WeakValueDictionary

from shuteye.tokenizer import Tokenizer

_held: WeakValueDictionary[tuple[bytes, str | None], Tokenizer] = WeakValueDictionary()


def tokenizer_of(directory: str | Path, *, chat_template: str | None = None) -> Tokenizer:
    """The tokenizer of a directory, as long as somebody has it the same for every directory of that content.

    Raises:
        UnsupportedModel: see `Tokenizer.from_directory`.
    """
    key = _digest(Path(directory)), chat_template
    tokenizer = _held.get(key)
    if tokenizer is None:
        _held[key] = tokenizer = Tokenizer.from_directory(directory, chat_template=chat_template)
    return tokenizer


def _digest(directory: Path) -> bytes:
    """Of all files there, with their names."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            digest.update(f"{path.relative_to(directory)}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.digest()
