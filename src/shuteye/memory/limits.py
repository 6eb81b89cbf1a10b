"""How much memory this process could still get: what the machine has left, and the control groups that it is in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_NO_LIMIT = 1 << 60
"""Version 1 writes "no limit" as the largest page-aligned 63-bit number, version 2 as `max`."""


@dataclass(frozen=True, slots=True)
class _GroupFiles:
    mount: str
    limit: str
    usage: str
    stat_prefix: str


_V1 = _GroupFiles("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
_V2 = (
    _GroupFiles("sys/fs/cgroup", "memory.max", "memory.current", ""),
    _GroupFiles("sys/fs/cgroup/unified", "memory.max", "memory.current", ""),
)


def available_bytes(root: Path = Path("/")) -> int:
    """Bytes that could still be allocated without swapping: the least of all that bound it.

    Raises:
        OSError: /proc is not readable.
    """
    return max(0, min([_machine_available(root), *_group_headrooms(root)]))


def read_fields(path: Path, *, unit_bytes: int = 1) -> dict[str, int]:
    """`name value …` or `Name: value kB` lines, as `{name: value * unit_bytes}`; other lines are skipped."""
    words = (line.replace(":", " ").split() for line in path.read_text().splitlines())
    return {word[0]: int(word[1]) * unit_bytes for word in words if len(word) >= 2 and word[1].isdigit()}


def _machine_available(root: Path) -> int:
    return read_fields(root / "proc/meminfo", unit_bytes=1024)["MemAvailable"]


def _group_headrooms(root: Path) -> Iterator[int]:
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            yield from _headrooms_up(root, path, _V1)
        elif not controllers:
            for files in _V2:
                yield from _headrooms_up(root, path, files)


def _headrooms_up(root: Path, path: str, files: _GroupFiles) -> Iterator[int]:
    """The headroom of a group and all its ancestors; inside a container only some of them can be seen."""
    mount = root / files.mount
    group = PurePosixPath(path.lstrip("/"))
    for ancestor in (group, *group.parents):
        directory = mount / ancestor
        if (directory / files.limit).is_file():
            yield _headroom(directory, files)


def _headroom(directory: Path, files: _GroupFiles) -> int:
    limit = (directory / files.limit).read_text().strip()
    if limit == "max" or int(limit) >= _NO_LIMIT:
        return _NO_LIMIT
    stat = read_fields(directory / "memory.stat")
    page_cache = sum(stat.get(f"{files.stat_prefix}{kind}_file", 0) for kind in ("active", "inactive"))
    return int(limit) - int((directory / files.usage).read_text()) + page_cache
