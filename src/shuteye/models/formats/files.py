"""A checkpoint's files as they lie on disk: missing, damaged, in which format, and a text that changes when they do.

Every complaint names the file, what is wrong with it, and what to do.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import Any, Literal

import xxhash
from safetensors import SafetensorError, safe_open

from shuteye.errors import MemoryExhausted, ShuteyeError, UnsupportedModel

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


WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_OBJECTS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
)
_ADVICE = "Fetch or copy the checkpoint again."
_LONGEST_REASON = 400
_MAIN_SHARE = 0.05
FLOAT_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn whatever foreign code raises over a checkpoint into one line that begins with `what`.

    Raises:
        UnsupportedModel: for every exception but our own, and those that are bugs of ours.
        MemoryExhausted: there was not enough memory.
    """
    try:
        yield
    except (ShuteyeError, AssertionError):
        raise
    except MemoryError as error:
        raise MemoryExhausted(f"{what}: there is not enough memory.") from error
    except Exception as error:
        raise UnsupportedModel(f"{what}: {reason_of(error)}. Check its files, or fetch it again.") from error


def reason_of(error: Exception) -> str:
    """What a foreign exception says, in one line of bearable length."""
    text = " ".join(str(error).split()) or "no reason given"
    text = text.rstrip(".") if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}…"
    return text if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UnsupportedModel: it cannot be read, or is something else.
    """
    found = _parse(path)
    if not isinstance(found, dict):
        raise damaged(path, f"it holds a {type(found).__name__} instead of a JSON object")
    return found


def require_json(directory: Path) -> None:
    """Parse every JSON file that converting a checkpoint reads, because those who read them do not name them.

    Raises:
        UnsupportedModel: one of them is damaged.
    """
    for name in _OBJECTS:
        if (directory / name).is_file():
            read_json(directory / name)
    for path in (directory / "modules.json", *directory.glob("[0-9]*_*/config.json")):
        if path.is_file():
            _parse(path)


def _parse(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise damaged(path, f"it is not JSON ({reason_of(error)})") from error


def require_regular(directory: Path) -> None:
    """Refuse pipes, sockets and devices: whoever opens one of them to read it may wait for ever.

    Raises:
        UnsupportedModel: names the first.
    """
    for path in sorted(directory.iterdir()):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UnsupportedModel(
                f"{path} is not a regular file. Copy the checkpoint's files into a directory of theirs."
            )


def missing_files(directory: Path) -> tuple[str, ...]:
    """Names of files without which the directory is no whole checkpoint; shards are named by their index.

    Raises:
        UnsupportedModel: the index is damaged.
    """
    missing = [] if (directory / "config.json").is_file() else ["config.json"]
    if (directory / WEIGHTS_FILE).is_file():
        return tuple(missing)
    if (directory / INDEX_FILE).is_file():
        return (*missing, *(name for name in _shards(directory) if not (directory / name).is_file()))
    found = [path.name for path in directory.glob("*.safetensors")]
    if any("-of-" in name for name in found):
        return (*missing, INDEX_FILE)
    return tuple(missing) if found else (*missing, WEIGHTS_FILE)


def _shards(directory: Path) -> list[str]:
    path = directory / INDEX_FILE
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise damaged(path, "it has no 'weight_map' from tensors to files")
    return sorted(set(shards.values()))


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that transformers would read; none if they have other names than it knows.

    Raises:
        UnsupportedModel: the index is damaged.
    """
    if (directory / WEIGHTS_FILE).is_file():
        return [directory / WEIGHTS_FILE]
    return [directory / name for name in _shards(directory)] if (directory / INDEX_FILE).is_file() else []


def open_weights(files: list[Path], stack: ExitStack, *, framework: Literal["pt", "numpy"] = "pt") -> dict[str, Any]:
    """Tensor name → the open file that holds it.

    Args:
        framework: of the tensors it gives; "pt" imports torch.

    Raises:
        UnsupportedModel: a file is missing, or damaged: its header, or bytes that should follow it.
    """
    found: dict[str, Any] = {}
    for path in files:
        try:
            file = stack.enter_context(safe_open(path, framework=framework))
        except (OSError, SafetensorError) as error:
            raise damaged(path, f"it is not a whole safetensors file ({' '.join(str(error).split())})") from error
        found |= dict.fromkeys(file.keys(), file)
    return found


def stored_formats(stored: Mapping[str, Any]) -> Counter[str]:
    """How many numbers are stored in which format, such as `bfloat16` or `I8`; `stored` is of `open_weights`."""
    counts: Counter[str] = Counter()
    for name, file in stored.items():
        part = file.get_slice(name)
        counts[FLOAT_NAMES.get(part.get_dtype(), part.get_dtype())] += prod(part.get_shape())
    return counts


def main_formats(counts: Counter[str]) -> str:
    """The formats of nearly all numbers, most used first: `Q4_1 and Q8_0`."""
    return " and ".join(name for name, count in counts.most_common() if count >= _MAIN_SHARE * counts.total())


def damaged(path: Path, what: str) -> UnsupportedModel:
    """The error for a file of a checkpoint that is not what it should be."""
    return UnsupportedModel(f"{path} cannot be used: {what}. {_ADVICE}")
