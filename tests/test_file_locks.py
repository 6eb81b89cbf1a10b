"""Who holds a lock, as the kernel tells it."""

from __future__ import annotations

import os
from pathlib import Path

from shuteye import file_locks

LINES = """\
1: POSIX  ADVISORY  WRITE 11 {file} 0 EOF
2: FLOCK  ADVISORY  READ 31 {file} 0 EOF
2: -> FLOCK  ADVISORY  WRITE 12 {file} 0 EOF
3: FLOCK  ADVISORY  READ 30 {file} 0 EOF
4: FLOCK  ADVISORY  READ 0 {file} 0 EOF
5: FLOCK  ADVISORY  READ 13 {other} 0 EOF
"""


def test_holders_are_those_of_this_file_and_no_waiters(tmp_path: Path, monkeypatch) -> None:
    """Would catch a process named that only waits, or that is in another container, or holds another file."""
    path = tmp_path / "file"
    path.touch()
    status = path.stat()
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    content = LINES.format(file=f"{device}:{status.st_ino}", other=f"{device}:{status.st_ino + 1}")
    (tmp_path / "locks").write_text(content)
    monkeypatch.setattr(file_locks, "_LOCKS", tmp_path / "locks")
    assert file_locks.holders(path) == (30, 31)


def test_without_the_kernel_s_word_nobody_is_named(tmp_path: Path, monkeypatch) -> None:
    """Would catch `images ls` failing where /proc has no locks."""
    monkeypatch.setattr(file_locks, "_LOCKS", tmp_path / "absent")
    assert file_locks.holders(tmp_path) == ()
    monkeypatch.undo()
    assert file_locks.holders(tmp_path / "absent") == ()
