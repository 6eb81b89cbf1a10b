"""A weight image: the file form of a weights arena, opened, read and checked.

Knows nothing of how it is made (`image_writer.py`) nor of where images are kept (`image_store.py`).

    <key>/weights.rank0.bin   the arena's bytes, page-aligned extents in layer order
    <key>/index.json          where each tensor lies, a checksum per extent and per file, what the image was made from
    <key>/buffers.bin         persistent buffers, if the model has any; copied on load, never mapped
    <key>/…/                  whatever else the builder put there, such as the tokenizer
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from shuteye.errors import ImageFailure
from shuteye.memory.arena import Arena
from shuteye.memory.image_files import FileRecord, checksum_hex, checksum_of_file, require_present, require_unchanged
from shuteye.memory.layout import Extent, Layout, Slot
from shuteye.memory.tensor_bytes import TensorBytes

FORMAT_VERSION = 2
"""1 had no checksums of the files beside the weights; such images are rebuilt."""

WEIGHTS_FILE = "weights.rank0.bin"
BUFFERS_FILE = "buffers.bin"
INDEX_FILE = "index.json"


@dataclass(frozen=True, slots=True)
class ImageIdentity:
    """What an image was made from: images of equal identity hold equal weights.

    Attributes:
        source: where the checkpoint came from, for people.
        fingerprint: changes whenever the checkpoint's content does.
        dtype: what is computed in, to which weights were cast that are not quantized.
        shard: which rank's part of them it holds, such as `tp0of2.pp0of1`; empty if it holds them all.
        form: what else was asked for that changes how weights lie or are rounded; empty if nothing was.
    """

    source: str
    fingerprint: str
    dtype: str
    shard: str = ""
    form: str = ""

    @property
    def key(self) -> str:
        """The image's directory name: readable, and different for every identity."""
        readable = re.sub(r"[^a-z0-9.]+", "-", Path(self.source).name.lower()).strip("-.")[:48]
        parts = (self.source, self.fingerprint, self.dtype, *filter(None, (self.shard, self.form)))
        digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
        return "-".join(part for part in (readable, self.dtype, self.form, self.shard, digest[:12]) if part)


@dataclass(frozen=True, slots=True)
class ImageIndex:
    """The content of `index.json`. `checksums` follow the layout's extents; `created` is seconds since 1970.

    `files` are all others beside it and the weights.
    """

    identity: ImageIdentity
    layout: Layout
    checksums: tuple[str, ...]
    aliases: Mapping[str, str]
    metadata: Mapping[str, Any]
    buffers: tuple[Slot, ...]
    files: tuple[FileRecord, ...]
    created: float

    def __post_init__(self) -> None:
        if len(self.checksums) != len(self.layout.extents):
            raise ValueError(f"{len(self.checksums)} checksums for {len(self.layout.extents)} extents")
        dangling = set(self.aliases.values()) - self.layout.slots.keys()
        if dangling:
            raise ValueError(f"aliases of unknown tensors: {', '.join(sorted(dangling))}")


class _IndexFile(msgspec.Struct, frozen=True):
    """`index.json` itself: the version is read first, and the checksum is of the raw `index` that follows it."""

    format: int
    checksum: str = ""
    index: msgspec.Raw = msgspec.Raw(b"")


def encode_index(index: ImageIndex) -> bytes:
    """The bytes of `index.json`."""
    raw = msgspec.Raw(msgspec.json.encode(index))
    return msgspec.json.encode(_IndexFile(FORMAT_VERSION, checksum_hex(bytes(raw)), raw))


def read_index(directory: Path) -> ImageIndex:
    """Read and check `index.json`.

    Raises:
        ImageFailure: missing, damaged, or of another format version.
    """
    with _reporting_damage(directory, rebuilt=True):
        file = msgspec.json.decode((directory / INDEX_FILE).read_bytes(), type=_IndexFile)
        if file.format != FORMAT_VERSION:
            raise ValueError(
                f"another version of shuteye made it (format {file.format}, this one reads {FORMAT_VERSION})"
            )
        if checksum_hex(bytes(file.index)) != file.checksum:
            raise ValueError(f"{INDEX_FILE} does not match its own checksum")
        return msgspec.json.decode(file.index, type=ImageIndex)


@contextmanager
def _reporting_damage(directory: Path, *, rebuilt: bool = False) -> Iterator[None]:
    """Turn whatever reading an image raises into an `ImageFailure` that says what to do.

    Args:
        rebuilt: what is found here makes the image one that is not there, which the next load rebuilds by itself.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        raise _damage(directory, error, rebuilt=rebuilt) from error


def _damage(directory: Path, error: Exception, *, rebuilt: bool = False) -> ImageFailure:
    remove = f"`shuteye images rm {directory.name}`"
    advice = (
        f"Loading its model rebuilds it; {remove} removes it."
        if rebuilt
        else f"Run {remove}; the next load rebuilds it."
    )
    return ImageFailure(f"The weight image {directory} cannot be used: {error}. {advice}")


class WeightImage:
    """An image in use: while open, nobody can remove it. Its file is only ever read, or mapped privately."""

    def __init__(self, path: Path, index: ImageIndex, fd: int) -> None:
        self.path = path
        self.fd = fd
        self.identity = index.identity
        self.layout = index.layout
        self.checksums = index.checksums
        self.aliases = index.aliases
        self.metadata = index.metadata
        self._index = index
        self._stamp = _stamp(fd)

    @classmethod
    def open(cls, path: Path) -> WeightImage:
        """Open and lock the image at `path`.

        Raises:
            FileNotFoundError: there is no such directory.
            ImageFailure: there is one, and it is damaged or of another format version.
        """
        while True:
            fd = _open_weights(path)
            try:
                fcntl.flock(fd, fcntl.LOCK_SH)
                index = read_index(path) if _is_still_there(path, fd) else None
                # Looked at again, because the lock keeps an image from removal but not, if damaged, from replacement.
                if index and _is_still_there(path, fd):
                    image = cls(path, index, fd)
                    image._require_usable()
                    return image
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def _require_usable(self) -> None:
        with _reporting_damage(self.path, rebuilt=True):
            nbytes = os.fstat(self.fd).st_size
            if nbytes != self.layout.nbytes:
                raise ValueError(f"{WEIGHTS_FILE} has {nbytes:,} bytes instead of {self.layout.nbytes:,}")
            if self.layout.page_bytes % mmap.PAGESIZE:
                raise ValueError(f"its pages are {self.layout.page_bytes} bytes, this machine's {mmap.PAGESIZE}")
            require_present(self.path, self._index.files, besides=(WEIGHTS_FILE, INDEX_FILE))

    def require_files_unchanged(self) -> int:
        """Read all files beside the weights and compare them with their checksums; how many bytes that were.

        Raises:
            ImageFailure: one differs, or cannot be read.
        """
        with _reporting_damage(self.path):
            return require_unchanged(self.path, self._index.files)

    def slot_name(self, name: str) -> str | None:
        """The slot of a tensor, whose own name it is or which is tied to it; None if there is none."""
        target = self.aliases.get(name, name)
        return target if target in self.layout.slots else None

    def read_buffers(self) -> dict[str, TensorBytes]:
        """The persistent buffers, by name, in writable memory of their own.

        Raises:
            ImageFailure: the file is missing or damaged.
        """
        if not self._index.buffers:
            return {}
        with _reporting_damage(self.path):
            (record,) = (file for file in self._index.files if file.name == BUFFERS_FILE)
            content = record.content(self.path)
        return {
            slot.name: TensorBytes(slot.shape, slot.dtype, memoryview(bytearray(content[slot.offset : slot.end])))
            for slot in self._index.buffers
        }

    def damaged_extents(self) -> tuple[int, ...]:
        """Read the whole file and compare it with the checksums.

        Raises:
            ImageFailure: reading failed.
        """
        with _reporting_damage(self.path):
            return tuple(
                extent.index
                for extent, expected in zip(self.layout.extents, self.checksums, strict=True)
                if checksum_of_file(self.fd, extent.offset, extent.nbytes) != expected
            )

    def load(self, arena: Arena, offset: int, nbytes: int) -> None:
        """Map bytes [offset, offset + nbytes) under the arena; populated later, privately writable.

        Raises:
            BackendFailure: the kernel refused.
        """
        arena.map_file(offset, nbytes, fd=self.fd)

    def checksum(self, extent: Extent) -> str:
        """What the extent's bytes hashed to when the image was sealed."""
        return self.checksums[extent.index]

    def require_intact(self) -> bool:
        """Refuse an image that somebody has written to since it was opened: what is mapped of it has changed, too.

        Size and times of the file are looked at, in two microseconds; only where they differ is it read, so that
        chmod, touch or a hard link do no harm. Nothing is read through a mapping, where a file cut short means SIGBUS.

        Returns:
            Whether anything was done to it at all since it was last asked.

        Raises:
            ImageFailure: its bytes are not those that were sealed, or it could not be read.
        """
        with _reporting_damage(self.path):
            stamp = _stamp(self.fd)
        if stamp == self._stamp:
            return False
        if stamp[0] != self.layout.nbytes:
            raise self._changed_in_use(f"{stamp[0]:,} bytes instead of {self.layout.nbytes:,}")
        damaged = self.damaged_extents()
        if damaged:
            raise self._changed_in_use(f"{len(damaged)} of {len(self.checksums)} extents differ from their checksums")
        self._stamp = stamp
        return True

    def _changed_in_use(self, what: str) -> ImageFailure:
        """As long as we hold it nobody can remove it, so the advice begins with our own end."""
        command = f"shuteye images rm {self.path.name} --cache-dir {shlex.quote(str(self.path.parent.parent))}"
        return ImageFailure(
            f"The weight image {self.path} was changed while in use: {what}. End the server or program that serves it, "
            f"run `{command}`, and start it again: the image is then rebuilt. Or put back the "
            "file's bytes, and wake up."
        )

    @property
    def closed(self) -> bool:
        """Whether the lock and the descriptor are gone."""
        return self.fd < 0

    def close(self) -> None:
        """Give up the lock. Mappings made from it stay. Idempotent."""
        if not self.closed:
            os.close(self.fd)
            self.fd = -1


def _open_weights(path: Path) -> int:
    try:
        return os.open(path / WEIGHTS_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if path.is_dir():
            raise _damage(path, error, rebuilt=True) from error
        raise FileNotFoundError(f"there is no weight image {path}") from error


def _is_still_there(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path / WEIGHTS_FILE), os.fstat(fd))
    except FileNotFoundError:
        return False


def _stamp(fd: int) -> tuple[int, int, int]:
    """Size and times of an open file; every write(2) and truncate(2) changes one of them before the first byte."""
    status = os.fstat(fd)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns
