"""What a GGUF file says of itself: its metadata, and where which tensor lies in it. Its numbers are read elsewhere.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from shuteye.errors import UnsupportedModel
from shuteye.models.formats.files import FLOAT_NAMES, damaged, reason_of

_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies in its file.

    Attributes:
        shape: rows before columns.
        stored_as: `Q4_K`, `F32`, …
        offset: in the file.
    """

    shape: tuple[int, ...]
    stored_as: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """A file's metadata, of which long arrays of text are left out, and its tensors by name."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """What the keys of the model's own metadata begin with."""
        return str(self.metadata["general.architecture"])

    def formats(self) -> Counter[str]:
        """How many numbers are stored in which format, such as `Q4_1`."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors.values():
            counts[FLOAT_NAMES.get(tensor.stored_as, tensor.stored_as)] += prod(tensor.shape)
        return counts


def read_gguf_header(path: Path) -> GgufHeader:
    """Parse what precedes the numbers of a GGUF file.

    Raises:
        UnsupportedModel: it is damaged, cut short, or of a version or format of numbers that is not known.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] != b"GGUF":
                raise damaged(path, f"it begins with {data[:4]!r} instead of the magic bytes of GGUF")
            header = _parse(path, _Cursor(data))
            size = len(data)
    except (ValueError, OSError, struct.error) as error:
        raise damaged(path, f"it is not a whole GGUF file ({reason_of(error)})") from error
    end = max((tensor.offset + tensor.nbytes for tensor in header.tensors.values()), default=0)
    if size < end:
        raise damaged(path, f"it has {size:,} bytes, and its tensors end at {end:,}")
    return header


class _Cursor:
    """Reads values one after the other; what lies behind the file's end is a `struct.error` or a `ValueError`."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.position = 0

    def take(self, layout: str) -> tuple[Any, ...]:
        """Little-endian values, by the letters of `struct`."""
        values = struct.unpack_from(f"<{layout}", self._data, self.position)
        self.position += struct.calcsize(f"<{layout}")
        return values

    def text(self) -> str:
        """A string with its length before it."""
        start, end = self._bounds()
        return self._data[start:end].decode()

    def _bounds(self) -> tuple[int, int]:
        (length,) = self.take("Q")
        start, self.position = self.position, self.position + length
        if self.position > len(self._data):
            raise ValueError(f"a text of {length:,} bytes begins at {start:,}, of {len(self._data):,} bytes")
        return start, self.position

    def value(self, kind: int) -> Any:
        """A value of the metadata; of arrays of text, how many there are."""
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.take(_scalar(kind))[0]
        element, count = self.take("IQ")
        if element == _STRING:
            for _ in range(count):
                self._bounds()
            return count
        if count * struct.calcsize(f"<{_scalar(element)}") > len(self._data):
            raise ValueError(f"an array of {count:,} values is longer than the file")
        return self.take(f"{count}{_scalar(element)}")


def _scalar(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"its metadata has values of type {kind}, which is not known")
    return _SCALARS[kind]


def _parse(path: Path, cursor: _Cursor) -> GgufHeader:
    _, version = cursor.take("4sI")
    if version not in _VERSIONS:
        raise UnsupportedModel(
            f"{path} is GGUF of version {version}, expected little-endian of version 2 or 3. Convert it again."
        )
    num_tensors, num_values = cursor.take("QQ")
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        key = cursor.text()
        metadata[key] = cursor.value(*cursor.take("I"))
    if "general.architecture" not in metadata:
        raise ValueError("it does not say its architecture")
    if metadata.get("split.count", 1) not in (0, 1):
        raise UnsupportedModel(f"{path} is one of {metadata['split.count']} parts; merge them with llama-gguf-split.")
    entries = list(_entries(cursor, num_tensors))
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"its tensors are aligned to {alignment!r} bytes")
    start = -(-cursor.position // alignment) * alignment
    tensors = {name: _tensor(path, name, shape, kind, start + offset) for name, shape, kind, offset in entries}
    if len(tensors) < len(entries):
        raise ValueError("two of its tensors have the same name")
    return GgufHeader(path, metadata, tensors)


def _entries(cursor: _Cursor, count: int) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
    """Name, shape, number of the type, and offset of each tensor."""
    for _ in range(count):
        name = cursor.text()
        (num_dimensions,) = cursor.take("I")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise ValueError(f"{name} has {num_dimensions} dimensions")
        shape = cursor.take(f"{num_dimensions}Q")[::-1]
        if 0 in shape:
            raise ValueError(f"{name} has the shape {shape}")
        yield name, shape, *cursor.take("IQ")


def _tensor(path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        stored_as = GGMLQuantizationType(kind)
    except ValueError as error:
        raise UnsupportedModel(f"{path}: {name} is stored in a format that is not known (ggml type {kind}).") from error
    block_columns, block_nbytes = GGML_QUANT_SIZES[stored_as]
    if shape[-1] % block_columns:
        raise ValueError(f"{name} has rows of {shape[-1]}, which are no blocks of {block_columns}")
    return GgufTensor(shape, stored_as.name, offset, prod(shape) // block_columns * block_nbytes)
