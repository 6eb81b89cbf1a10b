"""What processes share in a cache directory: lock files, and whatever killed ones left there, found and removed.

A lock is held by flock(2), so that it ends with the process that holds it, and its file is deleted by its last holder.
Whoever makes one of these holds its lock until it is done, or gone:

    images/.<key>.<random>   an image being built or removed   lock: images/<key>.lock, deleted by whoever held it
    images/<key>.lock        that lock, if its holder was killed
    wheels/.fetch-<random>   a wheel being fetched             lock: wheels/.lock, which stays
    spill/*.spill            a file that was about to lose its name, if its maker was killed just then
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shuteye.file_locks import is_locked, try_lock_file

logger = logging.getLogger(__name__)

_LASTING_LOCK = ".lock"


@dataclass(frozen=True, slots=True)
class Orphan:
    """A file or directory that no living process works on. `modified` is in seconds since 1970."""

    path: Path
    lock: Path | None
    nbytes: int
    modified: float


def find_orphans(cache_dir: Path) -> tuple[Orphan, ...]:
    """Everything that killed processes left there; changes nothing.

    Raises:
        OSError: the directory cannot be read.
    """
    return tuple(
        Orphan(path, lock, tree_bytes(path), path.lstat().st_mtime)
        for path, lock in sorted(_candidates(cache_dir))
        if lock is None or not is_locked(lock)
    )


def _candidates(cache_dir: Path) -> Iterator[tuple[Path, Path | None]]:
    images, wheels = cache_dir / "images", cache_dir / "wheels"
    for path in images.glob(".*.*"):
        yield path, images / f"{path.name[1:].rpartition('.')[0]}.lock"
    for path in images.glob("[!.]*.lock"):
        yield path, path
    for path in wheels.glob(".fetch-*"):
        yield path, wheels / _LASTING_LOCK
    for path in (cache_dir / "spill").glob("*.spill"):
        yield path, None


def remove_orphan(orphan: Orphan) -> bool:
    """Delete it; False if meanwhile somebody works there.

    Raises:
        OSError: it cannot be deleted.
    """
    with _held(orphan.lock) as ours:
        if ours:
            if orphan.path.is_dir():
                remove_tree(orphan.path)
            else:
                orphan.path.unlink(missing_ok=True)
        return ours


def records_of(cache_dir: Path, image_key: str) -> Path:
    """The directory of what was recorded of an image after it was made; it goes with the image."""
    return cache_dir / "records" / image_key


def remove_tree(directory: Path) -> None:
    """Delete a directory with all that is in it, also a finished image, which is read-only."""
    for path, _, _ in os.walk(directory):
        Path(path).chmod(0o755)
    shutil.rmtree(directory)


@contextmanager
def _held(lock: Path | None) -> Iterator[bool]:
    """Hold the lock, if nobody else does."""
    if lock is None:
        yield True
        return
    fd = try_lock_file(lock)
    try:
        yield fd is not None
    finally:
        if fd is not None:
            if lock.name != _LASTING_LOCK:
                lock.unlink(missing_ok=True)
            os.close(fd)


def sweep_orphans(cache_dir: Path) -> None:
    """Delete all of them; one that cannot be is logged, because nothing depends on it."""
    for orphan in find_orphans(cache_dir):
        try:
            remove_orphan(orphan)
        except OSError as error:
            logger.warning("%s, left by a killed process, cannot be removed: %s", orphan.path, error)


def tree_bytes(path: Path) -> int:
    """Bytes of a file, or of all files of a directory."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files if file.is_file())
