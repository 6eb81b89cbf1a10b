"""The files of an image, each with its size and checksum: what is missing, what is short, what has changed."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import xxhash

_MAX_NAMED = 3


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file as it was sealed; `name` is relative to the image's directory, with slashes."""

    name: str
    nbytes: int
    checksum: str

    def content(self, directory: Path) -> bytes:
        """The file's bytes, which are those that were sealed.

        Raises:
            OSError: it cannot be read.
            ValueError: it has other bytes.
        """
        content = (directory / self.name).read_bytes()
        if len(content) != self.nbytes:
            raise ValueError(f"{self.name} has {len(content):,} bytes instead of {self.nbytes:,}")
        if checksum_hex(content) != self.checksum:
            raise ValueError(f"{self.name} does not match its checksum")
        return content


def record_files(directory: Path, *, besides: Collection[str]) -> tuple[FileRecord, ...]:
    """A record of every file in `directory` that is not in `besides`.

    Raises:
        OSError: one cannot be read.
    """
    names = sorted(_names(directory) - set(besides))
    contents = ((name, (directory / name).read_bytes()) for name in names)
    return tuple(FileRecord(name, len(content), checksum_hex(content)) for name, content in contents)


def require_present(directory: Path, records: Iterable[FileRecord], *, besides: Collection[str]) -> None:
    """Refuse files that are missing, have another size, or were not there when the image was sealed. Reads none.

    Raises:
        ValueError: which, and what is wrong with them.
    """
    known = {record.name: record for record in records}
    _refuse(
        *(problem for name in known if (problem := _size_problem(directory, known[name]))),
        *(f"{name} was added to it" for name in sorted(_names(directory) - known.keys() - set(besides))),
    )


def require_unchanged(directory: Path, records: Iterable[FileRecord]) -> int:
    """Read every file and compare it with its checksum; how many bytes that were.

    Raises:
        ValueError: which differ, or cannot be read.
    """
    records = tuple(records)
    _refuse(*(problem for record in records if (problem := _content_problem(directory, record))))
    return sum(record.nbytes for record in records)


def _names(directory: Path) -> set[str]:
    """Every file from `directory` down, but for hidden ones, which file systems and backups leave and nobody reads."""
    return {
        Path(path, name).relative_to(directory).as_posix()
        for path, _, names in os.walk(directory)
        for name in names
        if not name.startswith(".")
    }


def _size_problem(directory: Path, record: FileRecord) -> str | None:
    try:
        nbytes = (directory / record.name).stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return f"{record.name} is missing"
    except OSError as error:
        return str(error)
    return None if nbytes == record.nbytes else f"{record.name} has {nbytes:,} bytes instead of {record.nbytes:,}"


def _content_problem(directory: Path, record: FileRecord) -> str | None:
    try:
        record.content(directory)
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _refuse(*problems: str) -> None:
    if problems:
        more = f", and {len(problems) - _MAX_NAMED} files more" if len(problems) > _MAX_NAMED else ""
        raise ValueError("; ".join(problems[:_MAX_NAMED]) + more)


_READ_BYTES = 4 << 20


def checksum_hex(data: bytes | bytearray | memoryview) -> str:
    """XXH3, 64 bits: finds damage, not malice. Source: https://xxhash.com."""
    return xxhash.xxh3_64_hexdigest(data)


def checksum_of_file(fd: int, offset: int, nbytes: int) -> str:
    """`checksum_hex` of a file's bytes [offset, offset + nbytes), read in pieces.

    Raises:
        OSError: reading failed or the file ended early.
    """
    hasher = xxhash.xxh3_64()
    end = offset + nbytes
    while offset < end:
        piece = os.pread(fd, min(_READ_BYTES, end - offset), offset)
        if not piece:
            raise OSError(f"the file ends at {offset:,} instead of {end:,}")
        hasher.update(piece)
        offset += len(piece)
    return hasher.hexdigest()
