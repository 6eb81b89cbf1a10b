"""Writes a weight image: streams tensors to their places, then seals the directory with checksums and an index."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from shuteye.errors import ImageFailure
from shuteye.memory.image import BUFFERS_FILE, INDEX_FILE, WEIGHTS_FILE, ImageIdentity, ImageIndex, encode_index
from shuteye.memory.image_files import checksum_of_file, record_files
from shuteye.memory.layout import Layout, Slot, TensorSpec, plan_layout
from shuteye.memory.tensor_bytes import TensorBytes

WeightData: TypeAlias = TensorBytes | bytes | bytearray | memoryview

_OWN_FILES = "/proc/self/fd"
_SPARE_BYTES = 64 << 20
"""Disk space that must be left over: the index, the tokenizer, and some air."""


@contextmanager
def reporting_write_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into an `ImageFailure` that names the place and what to do."""
    try:
        yield
    except OSError as error:
        raise ImageFailure(
            f"Writing to {path} failed: {error}. Check permissions and free space there, or choose another --cache-dir."
        ) from error


class ImageWriter:
    """What a builder is given: `begin` once, `put` every tensor in any order, and files of its own in `directory`."""

    def __init__(self, directory: Path, identity: ImageIdentity, *, page_bytes: int) -> None:
        self.directory = directory
        self.identity = identity
        self._page_bytes = page_bytes
        self._layout: Layout | None = None
        self._aliases: dict[str, str] = {}
        self._metadata: dict[str, Any] = {}
        self._fd = -1
        self._missing: set[str] = set()
        self._buffers: dict[str, TensorBytes] = {}

    def begin(
        self,
        specs: Iterable[TensorSpec],
        *,
        aliases: Mapping[str, str] | None = None,
        metadata: Mapping[str, Any] | None = None,
        beside_bytes: int = 0,
    ) -> Layout:
        """Fix the layout and make the file.

        Args:
            specs: every tensor of the arena, in layer order.
            aliases: other names of tied tensors, each with the name it stands for.
            metadata: JSON values for whoever opens the image.
            beside_bytes: that other images, begun and not yet written, are to take of the same disk.

        Raises:
            ImageFailure: the disk is too full, or refused.
        """
        assert self._layout is None, "begin() may be called once"
        layout = plan_layout(specs, page_bytes=self._page_bytes)
        assert layout.slots, "an image needs at least one tensor"
        with reporting_write_errors(self.directory):
            self._require_space(layout.nbytes, beside_bytes)
            self._fd = _create(self.directory)
            os.ftruncate(self._fd, layout.nbytes)
        self._layout, self._missing = layout, set(layout.slots)
        self._aliases, self._metadata = dict(aliases or {}), dict(metadata or {})
        return layout

    def _require_space(self, nbytes: int, beside_bytes: int) -> None:
        free = shutil.disk_usage(self.directory).free - beside_bytes
        if free < nbytes + _SPARE_BYTES:
            raise OSError(
                f"the weights take {nbytes:,} bytes, {_SPARE_BYTES:,} more must stay free, and only {free:,} are free"
            )

    def put(self, name: str, data: WeightData) -> None:
        """Write one tensor to its place: a tensor of exactly the slot's shape and dtype, or its bytes.

        Raises:
            ImageFailure: no such tensor, put twice, another shape, dtype or size, or the disk refused.
        """
        assert self._layout is not None, "begin() comes before put()"
        slot = self._layout.slots.get(name)
        if slot is None:
            raise ImageFailure(f"Tensor {name!r} is not in the layout of {self.identity.key}.")
        if name not in self._missing:
            raise ImageFailure(f"Tensor {name!r} was put twice into {self.identity.key}.")
        content = _bytes_for(slot, data)
        with reporting_write_errors(self.directory):
            _write_at(self._fd, content, slot.offset)
        self._missing.discard(name)

    def put_buffer(self, name: str, data: TensorBytes) -> None:
        """Keep a persistent buffer: copied on every load, never part of the arena."""
        assert name not in self._buffers, f"buffer {name!r} was put twice"
        self._buffers[name] = replace(data, content=memoryview(bytes(data.content)))

    def finish(self) -> None:
        """Seal the image: checksums, index, and everything on the device's surface.

        Raises:
            ImageFailure: tensors are missing, or the disk refused.
        """
        if self._layout is None:
            raise ImageFailure(f"The builder of {self.identity.key} never called begin().")
        if self._missing:
            names = sorted(self._missing)
            raise ImageFailure(
                f"{len(names)} tensors of {self.identity.key} were never written, such as {', '.join(names[:3])}."
            )
        with reporting_write_errors(self.directory):
            buffers = self._write_buffers()
            index = ImageIndex(
                identity=self.identity,
                layout=self._layout,
                checksums=tuple(checksum_of_file(self._fd, part.offset, part.nbytes) for part in self._layout.extents),
                aliases=self._aliases,
                metadata=self._metadata,
                buffers=buffers,
                files=record_files(self.directory, besides=(WEIGHTS_FILE, INDEX_FILE)),
                created=time.time(),
            )
            (self.directory / INDEX_FILE).write_bytes(encode_index(index))
            _give_name(self._fd, self.directory / WEIGHTS_FILE)
            _make_read_only(self.directory)
            sync_tree(self.directory)
            # Page cache that was written tensor by tensor is in small pieces, which every wake would map one by one
            # (docs/LOG.md, 2026-11-30); what is read from the disk again is in large ones.
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def _write_buffers(self) -> tuple[Slot, ...]:
        """The slots in `buffers.bin`; no file if there are none."""
        if not self._buffers:
            return ()
        specs = [TensorSpec(name, kept.shape, kept.dtype) for name, kept in self._buffers.items()]
        layout = plan_layout(specs, page_bytes=self._page_bytes)
        content = bytearray(layout.nbytes)
        for name, slot in layout.slots.items():
            content[slot.offset : slot.end] = _bytes_for(slot, self._buffers[name])
        (self.directory / BUFFERS_FILE).write_bytes(content)
        return tuple(layout.slots.values())

    def close(self) -> None:
        """Close the file, sealed or not. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _create(directory: Path) -> int:
    """A file for the weights, without a name where the file system can: a killed process then leaves none of it."""
    flags = os.O_RDWR | os.O_CLOEXEC
    if Path(_OWN_FILES).is_dir():
        try:
            return os.open(directory, flags | os.O_TMPFILE, 0o600)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
                raise
    return os.open(directory / WEIGHTS_FILE, flags | os.O_CREAT | os.O_EXCL, 0o600)


def _give_name(fd: int, path: Path) -> None:
    """Name a file that has no name yet. Source: open(2), O_TMPFILE."""
    if os.fstat(fd).st_nlink == 0:
        # With a directory given, though an absolute path needs none, Python follows the link to the file itself.
        os.link(f"{_OWN_FILES}/{fd}", path, src_dir_fd=fd, follow_symlinks=True)


def _bytes_for(slot: Slot, data: WeightData) -> memoryview:
    """The bytes of `data`, once it is known to fit `slot`."""
    if isinstance(data, TensorBytes):
        if (data.shape, data.dtype) != (slot.shape, slot.dtype):
            raise ImageFailure(
                f"Tensor {slot.name!r} must be {slot.dtype} {slot.shape}, got {data.dtype} {data.shape}."
            )
        return data.content
    content = memoryview(data).cast("B")
    if content.nbytes != slot.nbytes:
        raise ImageFailure(f"Tensor {slot.name!r} must have {slot.nbytes:,} bytes, got {content.nbytes:,}.")
    return content


def _write_at(fd: int, content: memoryview, offset: int) -> None:
    while content:
        written = os.pwrite(fd, content, offset)
        content, offset = content[written:], offset + written


def _make_read_only(directory: Path) -> None:
    """Against slips of the hand; root, and the owner after a chmod, can yet write to them."""
    for path, _, names in os.walk(directory, topdown=False):
        for name in names:
            Path(path, name).chmod(0o444)
        Path(path).chmod(0o555)


def sync_tree(directory: Path) -> None:
    """Sync every file and directory from `directory` down, so that a rename after it cannot come first.

    Raises:
        OSError: the device failed.
    """
    for path, _, names in os.walk(directory):
        for name in (*names, ""):
            fd = os.open(Path(path, name), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
