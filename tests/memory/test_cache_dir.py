"""What killed processes leave: found, removed, and never taken from under a living one."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from shuteye.file_locks import lock_file
from shuteye.memory.cache_dir import find_orphans, remove_orphan, sweep_orphans

KEY = "model-1.5-bfloat16-0123456789ab"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """One orphan of every kind, beside a finished image and a fetched wheel."""
    for name in (f"images/{KEY}", f"images/.{KEY}.abcd_1", "wheels/.fetch-x/unpacked", "wheels/toy-1.0", "spill"):
        (tmp_path / name).mkdir(parents=True)
    for name in (f"images/{KEY}", f"images/.{KEY}.abcd_1", "wheels/.fetch-x/unpacked", "wheels/toy-1.0"):
        (tmp_path / name / "file").write_bytes(bytes(1000))
    for name in (f"images/{KEY}.lock", "wheels/.lock", "spill/shuteye-x.spill"):
        (tmp_path / name).touch()
    return tmp_path


def found(cache: Path) -> dict[str, int]:
    return {str(orphan.path.relative_to(cache)): orphan.nbytes for orphan in find_orphans(cache)}


ALL = {
    f"images/.{KEY}.abcd_1": 1000,
    f"images/{KEY}.lock": 0,
    "spill/shuteye-x.spill": 0,
    "wheels/.fetch-x": 1000,
}


def test_every_kind_is_found_and_swept_and_nothing_else(cache: Path) -> None:
    assert found(cache) == ALL
    sweep_orphans(cache)
    assert found(cache) == {}
    left = sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file())
    assert left == [f"images/{KEY}/file", "wheels/.lock", "wheels/toy-1.0/file"]


def test_a_cache_that_is_not_there_has_none(tmp_path: Path) -> None:
    assert find_orphans(tmp_path / "absent") == ()


def test_what_somebody_works_on_is_left_alone(cache: Path) -> None:
    """Would catch a sweep that deletes an image while another process builds it."""
    seen = find_orphans(cache)
    building = lock_file(cache / "images" / f"{KEY}.lock")
    fetching = os.open(cache / "wheels" / ".lock", os.O_RDWR)
    fcntl.flock(fetching, fcntl.LOCK_EX)
    assert found(cache) == {"spill/shuteye-x.spill": 0}
    assert [remove_orphan(orphan) for orphan in seen if orphan.lock] == [False] * 3
    assert (cache / "images" / f".{KEY}.abcd_1" / "file").exists()
    assert (cache / "images" / f"{KEY}.lock").exists()
    os.close(building)
    os.close(fetching)
    assert found(cache) == ALL


def test_a_directory_that_cannot_be_written_is_no_reason_to_stop(cache: Path, monkeypatch, caplog) -> None:
    def refuse(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with caplog.at_level(logging.WARNING):
        sweep_orphans(cache)
    assert "Read-only file system" in caplog.text


KILLED = """
    import sys, time
    from pathlib import Path
    sys.path.insert(0, sys.argv[2])
    from memory_harness import build_image
    from shuteye.memory.image import ImageIdentity
    from shuteye.memory.image_store import ImageStore

    def build(writer):
        build_image(1)(writer)
        print("written", flush=True)
        time.sleep(60)

    ImageStore(Path(sys.argv[1])).open_or_build(ImageIdentity("test/model-1.5", "1", "bfloat16"), build)
"""


def test_a_killed_build_leaves_no_weights_and_the_rest_is_swept_whatever_is_built_next(tmp_path: Path) -> None:
    """Would catch a killed build's gigabytes: on disk, shown nowhere, and swept only when that model is built again."""
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), str(Path(__file__).parents[1] / "helpers")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        assert find_orphans(tmp_path) == (), "it is still being built"
        process.send_signal(signal.SIGKILL)
    orphans = find_orphans(tmp_path)
    assert sorted(orphan.path.suffix == ".lock" for orphan in orphans) == [False, True]
    assert sum(orphan.nbytes for orphan in orphans) == len("{{ messages }}"), (
        "the tokenizer; the weights never had a name"
    )
    sweep_orphans(tmp_path)
    assert os.listdir(tmp_path / "images") == []
