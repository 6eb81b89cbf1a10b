"""The directory of weight images: opened if there, built once if not, listed, checked and removed.

Two locks, both flock(2), so both die with their process:
    `<key>.lock`, exclusive: held by whoever builds, replaces or removes `<key>`.
    `<key>/weights.rank0.bin`, shared: held by whoever uses the image.
An image appears by one rename of a finished, synced directory; a crash leaves only `.<key>.*`, which the next to hold
the key's lock sweeps away (`cache_dir.py` does so for every key).
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from shuteye.errors import ImageFailure
from shuteye.file_locks import holders, lock_file, try_lock
from shuteye.memory.cache_dir import records_of, remove_tree, tree_bytes
from shuteye.memory.image import INDEX_FILE, WEIGHTS_FILE, ImageIdentity, WeightImage, read_index
from shuteye.memory.image_writer import ImageWriter, reporting_write_errors
from shuteye.memory.precision import Precision
from shuteye.state import VerifyResult


@dataclass(frozen=True, slots=True)
class ImageSummary:
    """One image for `shuteye images ls`; times are seconds since 1970.

    Attributes:
        dtype: what is computed in.
        weights: the format they are held in.
        users: the processes that use it, as far as the system tells.
        damage: why it cannot be opened, or None; `source`, `dtype` and `weights` are then unknown and empty.
    """

    key: str
    source: str
    dtype: str
    weights: str
    bits_per_weight: float
    nbytes: int
    created: float
    last_used: float
    in_use: bool
    users: tuple[int, ...] = ()
    damage: str | None = None


class ImageStore:
    """The images under `<cache_dir>/images`. Safe between any number of processes on one machine."""

    def __init__(self, cache_dir: Path) -> None:
        self._root = Path(cache_dir) / "images"

    def open(self, identity: ImageIdentity) -> WeightImage | None:
        """The image of `identity`, or None if there is none.

        Raises:
            ImageFailure: there is one, and it is damaged or of another format version.
        """
        path = self._root / identity.key
        try:
            image = WeightImage.open(path)
        except FileNotFoundError:
            return None
        if image.identity != identity:
            image.close()
            raise ImageFailure(f"The weight image {path} was made from {image.identity}, not from {identity}.")
        with suppress(OSError):  # a cache that cannot be written keeps no time of last use
            os.utime(path / INDEX_FILE)
        return image

    def open_key(self, key: str) -> WeightImage:
        """The image that was there under this very key a moment ago.

        Raises:
            ImageFailure: it was removed meanwhile, or is damaged.
        """
        try:
            return WeightImage.open(self._root / key)
        except FileNotFoundError as error:
            raise ImageFailure(f"The weight image {key} was removed meanwhile. Try again.") from error

    def open_or_build(self, identity: ImageIdentity, build: Callable[[ImageWriter], None]) -> WeightImage:
        """The image of `identity`, built first if there is none that can be used.

        Whoever comes second while it is being built waits, and opens what the first one built.

        Raises:
            ImageFailure: it cannot be written. Whatever `build` raises passes through; no image is left then.
        """
        return self.open_or_build_one_of(identity, (identity,), lambda writers: build(*writers))

    def open_or_build_one_of(
        self, identity: ImageIdentity, identities: Sequence[ImageIdentity], build: Callable[[list[ImageWriter]], None]
    ) -> WeightImage:
        """The image of `identity`; if there is none that can be used, then all of `identities` that lack one are built,
        together.

        Args:
            identities: in the same order whoever asks, as they are locked one after the other.
            build: is given a writer for each image that is to be built.

        Raises:
            ImageFailure: as `open_or_build`; images that were finished before one failed stay.
        """
        image = self._open_usable(identity)
        if image is not None:
            return image
        with ExitStack() as locks:
            for each in identities:
                locks.enter_context(self._exclusive(each.key))
            image = self._open_usable(identity)
            if image is None:
                self._build([each for each in identities if not self._is_usable(each)], build)
                image = self.open(identity)
        assert image is not None, "an image cannot be removed while its lock is held"
        return image

    def _is_usable(self, identity: ImageIdentity) -> bool:
        image = self._open_usable(identity)
        if image is None:
            return False
        image.close()
        return True

    def _open_usable(self, identity: ImageIdentity) -> WeightImage | None:
        """`open`, but a damaged image counts as none."""
        try:
            return self.open(identity)
        except ImageFailure:
            return None  # replaced by what is built next

    def _build(self, identities: Sequence[ImageIdentity], build: Callable[[list[ImageWriter]], None]) -> None:
        with ExitStack() as undo:
            writers = [undo.enter_context(self._writer(identity)) for identity in identities]
            build(writers)
            for writer in writers:
                writer.finish()
            for writer in writers:
                with reporting_write_errors(self._root):
                    self._publish(writer.directory, writer.identity.key)

    @contextmanager
    def _writer(self, identity: ImageIdentity) -> Iterator[ImageWriter]:
        """Of an image out of sight; what is not published of it is deleted."""
        self._sweep(identity.key)
        with reporting_write_errors(self._root):
            directory = Path(tempfile.mkdtemp(prefix=f".{identity.key}.", dir=self._root))
        writer = ImageWriter(directory, identity, page_bytes=mmap.PAGESIZE)
        try:
            yield writer
        finally:
            writer.close()
            self._sweep(identity.key)

    def _publish(self, directory: Path, key: str) -> None:
        """Let the finished directory appear as `key`, in place of a damaged one if there is one."""
        self._set_aside(key)
        directory.rename(self._root / key)
        _sync_directory(self._root)

    def _set_aside(self, key: str) -> None:
        """Take the directory of `key`, if there is one, out of sight; whoever maps its file keeps the file."""
        shutil.rmtree(records_of(self._root.parent, key), ignore_errors=True)
        with suppress(FileNotFoundError):
            (self._root / key).chmod(0o755)  # a directory that cannot be written cannot change its parent
            (self._root / key).rename(Path(tempfile.mkdtemp(prefix=f".{key}.", dir=self._root)) / "old")

    def _sweep(self, key: str) -> None:
        """Delete what is out of sight: a crashed build, a removed image. The lock of `key` must be held."""
        for leftover in self._root.glob(f".{key}.*"):
            with reporting_write_errors(leftover):
                remove_tree(leftover)

    @contextmanager
    def _exclusive(self, key: str) -> Iterator[None]:
        """Hold the lock of `key`, waiting for whoever has it. The lock file goes when its holder leaves."""
        path = self._root / f"{key}.lock"
        with reporting_write_errors(path):
            self._root.mkdir(parents=True, exist_ok=True)
            fd = lock_file(path)
        try:
            yield
        finally:
            with suppress(OSError):  # one that stays is nobody's lock, and is locked by the next
                path.unlink()
            os.close(fd)

    def list(self) -> tuple[ImageSummary, ...]:
        """Every image, the damaged ones too, by key.

        Raises:
            ImageFailure: the directory cannot be read.
        """
        return tuple(self._summarize(key) for key in self._keys())

    def _keys(self) -> tuple[str, ...]:
        try:
            paths = sorted(self._root.iterdir())
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise ImageFailure(f"The weight images in {self._root} cannot be listed: {error}.") from error
        return tuple(path.name for path in paths if path.is_dir() and not path.name.startswith("."))

    def _summarize(self, key: str) -> ImageSummary:
        path = self._root / key
        nbytes = tree_bytes(path)
        index_path = path / INDEX_FILE
        last_used = (index_path if index_path.exists() else path).stat().st_mtime
        in_use = self._in_use(key)
        users = holders(path / WEIGHTS_FILE) if in_use else ()
        try:
            index = read_index(path)
        except ImageFailure as failure:
            damage = str(failure.__cause__)
            return ImageSummary(key, "", "", "", 0.0, nbytes, last_used, last_used, in_use, users, damage)
        held, source, dtype = Precision.of(index.layout), index.identity.source, index.identity.dtype
        return ImageSummary(
            key, source, dtype, held.format, held.bits_per_weight, nbytes, index.created, last_used, in_use, users
        )

    def _in_use(self, key: str) -> bool:
        with self._unused(key) as unused:
            return not unused

    @contextmanager
    def _unused(self, key: str) -> Iterator[bool]:
        """Whether nobody uses the image; while the context lasts, nobody can begin to."""
        try:
            fd = os.open(self._root / key / WEIGHTS_FILE, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            yield True
            return
        try:
            yield try_lock(fd)
        finally:
            os.close(fd)

    def remove(self, key: str) -> int:
        """Delete the image of `key` (or a unique prefix of one); the bytes it took.

        Raises:
            ImageFailure: no such image, an ambiguous prefix, or somebody uses it.
        """
        key = self._resolve(key)
        with self._exclusive(key), self._unused(key) as unused:
            if not unused:
                state = in_use_by(holders(self._root / key / WEIGHTS_FILE))
                raise ImageFailure(f"The weight image {key} is {state}. Stop the server that uses it first.")
            with reporting_write_errors(self._root / key):
                nbytes = tree_bytes(self._root / key)
                self._set_aside(key)
            self._sweep(key)
            return nbytes

    def verify(self, key: str) -> VerifyResult:
        """Read the whole image of `key` (or a unique prefix of one) and compare it with its checksums.

        Raises:
            ImageFailure: no such image, an ambiguous prefix, it cannot even be opened, or a file beside the
                weights differs.
        """
        image = self.open_key(self._resolve(key))
        try:
            nbytes = image.require_files_unchanged() + image.layout.nbytes
            return VerifyResult(verified_bytes=nbytes, bad_extents=image.damaged_extents())
        finally:
            image.close()

    def _resolve(self, prefix: str) -> str:
        keys = self._keys()
        found = [key for key in keys if key == prefix] or [key for key in keys if prefix and key.startswith(prefix)]
        if len(found) != 1:
            problem = f"matches {', '.join(found)}" if found else f"matches none of: {', '.join(keys) or 'no images'}"
            raise ImageFailure(f"The image key {prefix!r} {problem}. `shuteye images ls` shows the keys.")
        return found[0]


def in_use_by(users: Sequence[int]) -> str:
    """`in use by process 7`, or only `in use` if nobody knows by which."""
    return f"in use by process{'es' * (len(users) > 1)} {', '.join(map(str, users))}" if users else "in use"


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
