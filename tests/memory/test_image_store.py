"""The store: one builder, many readers, crashes in between, and never half an image."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from memory_harness import PAGE, TEMPLATE, build_image, unseal

from shuteye.errors import ImageFailure
from shuteye.memory.cache_dir import find_orphans
from shuteye.memory.image import BUFFERS_FILE, INDEX_FILE, WEIGHTS_FILE, ImageIdentity, WeightImage
from shuteye.memory.image_store import ImageStore
from shuteye.memory.image_writer import ImageWriter

IDENTITY = ImageIdentity("test/model", "1", "bfloat16")


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path)


def never(_: ImageWriter) -> None:
    raise AssertionError("built although there was an image")


def build_and_close(store: ImageStore, identity: ImageIdentity = IDENTITY) -> Path:
    image = store.open_or_build(identity, build_image(1))
    image.close()
    return image.path


def leftovers(store_dir: Path) -> list[str]:
    """Everything beside finished images."""
    return sorted(name for name in os.listdir(store_dir / "images") if name.startswith(".") or name.endswith(".lock"))


def test_an_image_is_built_once_and_then_opened(store: ImageStore, tmp_path: Path) -> None:
    assert store.open(IDENTITY) is None
    build_and_close(store)
    for image in (store.open_or_build(IDENTITY, never), store.open(IDENTITY)):
        assert image is not None
        assert image.identity == IDENTITY
        image.close()
    assert leftovers(tmp_path) == []


def test_a_changed_checkpoint_makes_another_image(store: ImageStore) -> None:
    first = build_and_close(store)
    assert build_and_close(store, ImageIdentity("test/model", "2", "bfloat16")) != first
    assert len(store.list()) == 2


def test_extra_files_of_the_builder_arrive_with_the_image(store: ImageStore) -> None:
    image = store.open_or_build(IDENTITY, build_image(1))
    assert (image.path / TEMPLATE).read_text() == "{{ messages }}"
    image.close()


def test_a_failing_builder_leaves_nothing_and_its_error_passes(store: ImageStore, tmp_path: Path) -> None:
    def build(writer: ImageWriter) -> None:
        build_image(1)(writer)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.open_or_build(IDENTITY, build)
    assert os.listdir(tmp_path / "images") == []


CRASHING_BUILDER = """
    import sys, time
    from pathlib import Path
    sys.path.insert(0, sys.argv[2])
    from memory_harness import build_image, unseal
    from shuteye.memory.image import ImageIdentity
    from shuteye.memory.image_store import ImageStore

    def build(writer):
        build_image(1)(writer)
        print("written", flush=True)
        time.sleep(60)

    ImageStore(Path(sys.argv[1])).open_or_build(ImageIdentity("test/model", "1", "bfloat16"), build)
"""


def test_a_builder_killed_before_the_end_leaves_no_image_and_the_next_one_sweeps(
    store: ImageStore, tmp_path: Path
) -> None:
    here = str(Path(__file__).parents[1] / "helpers")
    command = [sys.executable, "-c", textwrap.dedent(CRASHING_BUILDER), str(tmp_path), here]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    assert store.open(IDENTITY) is None
    assert store.list() == ()
    assert len(leftovers(tmp_path)) == 2, "the temporary directory and the lock file"
    build_and_close(store)
    assert leftovers(tmp_path) == []
    assert store.verify("model").bad_extents == ()


SLOW_BUILDER = """
    import sys, time
    from pathlib import Path
    sys.path.insert(0, sys.argv[2])
    from memory_harness import build_image, unseal
    from shuteye.memory.image import ImageIdentity
    from shuteye.memory.image_store import ImageStore

    def build(writer):
        print("building", flush=True)
        time.sleep(0.5)
        build_image(1)(writer)

    ImageStore(Path(sys.argv[1])).open_or_build(ImageIdentity("test/model", "1", "bfloat16"), build)
"""


def test_an_image_is_sealed_and_can_yet_be_removed_and_replaced(store: ImageStore, tmp_path: Path) -> None:
    """Would catch weights that a slip of the hand overwrites, and seals that keep shuteye itself out."""
    image = store.open_or_build(IDENTITY, build_image(1))
    image.close()
    everything = [image.path, *image.path.rglob("*")]
    modes = {path.relative_to(image.path).as_posix(): stat.S_IMODE(path.stat().st_mode) for path in everything}
    assert modes == {
        **dict.fromkeys((".", "tokenizer"), 0o555),
        **dict.fromkeys(("weights.rank0.bin", "index.json", "buffers.bin", TEMPLATE), 0o444),
    }
    index = image.path / "index.json"
    index.chmod(0o644)
    index.write_text("damaged")
    build_and_close(store)
    assert stat.S_IMODE(index.stat().st_mode) == 0o444
    assert store.remove(IDENTITY.key) > 0
    assert [path.name for path in (tmp_path / "images").iterdir()] == []


def test_a_second_process_waits_for_the_one_that_builds_and_opens_what_it_built(
    store: ImageStore, tmp_path: Path
) -> None:
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(SLOW_BUILDER),
        str(tmp_path),
        str(Path(__file__).parents[1] / "helpers"),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "building\n"
        assert store.open(IDENTITY) is None, "not yet, and not half"
        image = store.open_or_build(IDENTITY, never)
        assert image.damaged_extents() == ()
        image.close()
        assert process.wait(timeout=60) == 0
    assert leftovers(tmp_path) == []


def test_of_many_builders_at_once_one_builds_and_all_open(store: ImageStore) -> None:
    built: list[str] = []

    def build(writer: ImageWriter) -> None:
        built.append(writer.directory.name)
        time.sleep(0.1)
        build_image(1)(writer)

    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(lambda _: store.open_or_build(IDENTITY, build), range(8)))
    assert len(built) == 1
    assert [image.damaged_extents() for image in images] == [()] * 8
    for image in images:
        image.close()


def test_many_threads_building_removing_and_opening_never_see_half_an_image(store: ImageStore) -> None:
    """Removal between the open and the lock of a reader, lock files unlinked under waiters."""
    stop = time.monotonic() + 1.5
    problems: list[BaseException] = []
    opened = [0]

    def run(action) -> None:
        try:
            while time.monotonic() < stop:
                action()
        except BaseException as error:  # noqa: BLE001 - reported by the assertion below
            problems.append(error)

    def use() -> None:
        image = store.open_or_build(IDENTITY, build_image(1))
        assert image.damaged_extents() == ()
        opened[0] += 1
        image.close()

    def remove() -> None:
        try:
            store.remove(IDENTITY.key)
        except ImageFailure as failure:
            if "in use" not in failure.message and "matches none" not in failure.message:
                raise

    threads = [threading.Thread(target=run, args=(action,)) for action in (use, use, use, remove)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert opened[0] > 10


@pytest.mark.parametrize("name", [INDEX_FILE, WEIGHTS_FILE, BUFFERS_FILE, TEMPLATE])
def test_a_damaged_image_is_refused_by_open_and_replaced_by_open_or_build(
    store: ImageStore, tmp_path: Path, name: str
) -> None:
    path = build_and_close(store)
    (path / name).chmod(0o644)
    (path / name).write_bytes(b"damage")
    with pytest.raises(ImageFailure, match="images rm"):
        store.open(IDENTITY)
    (summary,) = store.list()
    assert (summary.damage is None) == (name != INDEX_FILE), "the list reads only the index"
    build_and_close(store)
    assert store.verify(IDENTITY.key).bad_extents == ()
    assert leftovers(tmp_path) == []


def test_replacing_a_damaged_image_leaves_its_users_their_file(store: ImageStore) -> None:
    user = store.open_or_build(IDENTITY, build_image(1))
    content = os.pread(user.fd, PAGE, 0)
    (unseal(user.path) / INDEX_FILE).write_text("damage")
    build_and_close(store)
    assert os.pread(user.fd, PAGE, 0) == content
    user.close()


def test_an_image_of_another_identity_under_the_same_key_is_not_served(store: ImageStore) -> None:
    other = ImageIdentity("test/model", "2", "bfloat16")
    build_and_close(store).rename(build_and_close(store, other).with_name("x"))
    os.rename(store._root / "x", store._root / "y")
    store.remove(other.key)
    os.rename(store._root / "y", store._root / other.key)
    with pytest.raises(ImageFailure, match="was made from"):
        store.open(other)


def test_list_reports_source_size_times_and_use(store: ImageStore) -> None:
    started = time.time()
    image = store.open_or_build(IDENTITY, build_image(1))
    (summary,) = store.list()
    assert (summary.key, summary.source, summary.dtype) == (IDENTITY.key, "test/model", "bfloat16")
    assert summary.nbytes >= 7 * PAGE
    assert started - 1 <= summary.created <= summary.last_used + 1 <= time.time() + 2
    assert summary.in_use
    image.close()
    assert not store.list()[0].in_use


def test_opening_is_remembered_as_use(store: ImageStore) -> None:
    path = build_and_close(store)
    os.utime(path / INDEX_FILE, (1, 1))
    assert store.list()[0].last_used == 1
    build_and_close(store)
    assert store.list()[0].last_used > 1


def test_an_image_in_use_cannot_be_removed_and_one_at_rest_can(store: ImageStore, tmp_path: Path) -> None:
    image = store.open_or_build(IDENTITY, build_image(1))
    with pytest.raises(ImageFailure, match="in use"):
        store.remove(IDENTITY.key)
    assert image.damaged_extents() == ()
    image.close()
    assert store.remove("mod") > 7 * PAGE
    assert (store.list(), os.listdir(tmp_path / "images")) == ((), [])


def test_a_damaged_image_can_be_removed(store: ImageStore) -> None:
    path = build_and_close(store)
    (unseal(path) / WEIGHTS_FILE).unlink()
    store.remove(IDENTITY.key)
    assert store.list() == ()


def test_prefixes_must_be_unique_and_exist(store: ImageStore) -> None:
    with pytest.raises(ImageFailure, match="matches none of: no images"):
        store.remove("mod")
    build_and_close(store)
    build_and_close(store, ImageIdentity("test/model", "2", "bfloat16"))
    with pytest.raises(ImageFailure, match=r"'mod' matches model-bfloat16-\w+, model-bfloat16-\w+"):
        store.verify("mod")
    with pytest.raises(ImageFailure, match="matches none of: model"):
        store.verify("")
    assert store.verify(IDENTITY.key).verified_bytes == 8 * PAGE + len("{{ messages }}")


def test_verify_finds_the_damaged_extent_and_damaged_files(store: ImageStore) -> None:
    """Would catch `images verify` agreeing to a chat template that is another one."""
    path = build_and_close(store)
    with_hole = bytearray((path / WEIGHTS_FILE).read_bytes())
    with_hole[6 * PAGE] ^= 1
    (unseal(path) / WEIGHTS_FILE).write_bytes(with_hole)
    assert store.verify(IDENTITY.key).bad_extents == (3,)
    for name in (TEMPLATE, BUFFERS_FILE):
        (path / name).write_bytes(bytes((path / name).stat().st_size))
        with pytest.raises(ImageFailure, match=f"{name} does not match its checksum.*images rm {IDENTITY.key}"):
            store.verify(IDENTITY.key)


def test_a_cache_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ImageFailure, match=r"file/images.*--cache-dir"):
        ImageStore(tmp_path / "file").open_or_build(IDENTITY, build_image(1))


def test_a_disk_that_fills_up_while_writing_leaves_nothing(tmp_path: Path) -> None:
    """With the real errno of a file too large: the limit is set in a process of its own."""
    code = """
        import resource, sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from memory_harness import build_image, unseal
        from shuteye.errors import ImageFailure
        from shuteye.memory.image import ImageIdentity
        from shuteye.memory.image_store import ImageStore

        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            ImageStore(Path(sys.argv[1])).open_or_build(ImageIdentity("m", "1", "bfloat16"), build_image(1))
        except ImageFailure as failure:
            print(failure.message)
    """
    here = str(Path(__file__).parents[1] / "helpers")
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path), here]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "File too large" in result.stdout, result.stderr
    assert os.listdir(tmp_path / "images") == []


def test_two_readers_share_an_image(store: ImageStore) -> None:
    first = store.open_or_build(IDENTITY, build_image(1))
    second = WeightImage.open(first.path)
    first.close()
    with pytest.raises(ImageFailure, match="in use"):
        store.remove(IDENTITY.key)
    second.close()
    store.remove(IDENTITY.key)


def test_everything_is_synced_before_the_rename_and_the_rename_after_it(
    store: ImageStore, tmp_path: Path, monkeypatch
) -> None:
    """Would catch an image that has its name after a power cut, but not its bytes."""
    calls: list[tuple[str, str]] = []
    sync, rename = os.fsync, os.rename

    def recorded_sync(fd: int) -> None:
        calls.append(("sync", os.readlink(f"/proc/self/fd/{fd}")))
        sync(fd)

    def recorded_rename(source: os.PathLike[str], target: os.PathLike[str]) -> None:
        calls.append(("rename", str(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_sync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    image = store.open_or_build(IDENTITY, build_image(1))
    image.close()
    renamed = calls.index(("rename", str(image.path)))
    synced = [name for call, name in calls[:renamed] if call == "sync"]
    (directory,) = {name for name in synced if Path(name).parent == tmp_path / "images"}
    within = {name.removeprefix(directory) for name in synced}
    files = {str(file).removeprefix(str(image.path)) for file in image.path.rglob("*")}
    assert within == files | {""}, "every file, every directory, and that of the image itself"
    assert ("sync", str(tmp_path / "images")) in calls[renamed:]


@pytest.fixture(params=[errno.EROFS, errno.EACCES])
def read_only(request, monkeypatch):
    """Nothing in this process can write to a file system any more; permission bits would not bind root."""
    problem = OSError(request.param, os.strerror(request.param))
    really_open = os.open

    def refuse(*_arguments, **_options):
        raise problem

    def open_to_read(path, flags, *arguments, **options):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise problem
        return really_open(path, flags, *arguments, **options)

    def begin() -> None:
        monkeypatch.setattr(os, "open", open_to_read)
        for name in ("utime", "mkdir", "unlink", "rename", "rmdir", "link"):
            monkeypatch.setattr(os, name, refuse)

    return begin


def test_a_read_only_cache_serves_lists_and_verifies_what_it_has(store: ImageStore, read_only) -> None:
    """Would catch a ready image that cannot be served because its time of last use cannot be noted."""
    path = build_and_close(store)
    read_only()
    image = store.open_or_build(IDENTITY, never)
    assert image.path == path
    (summary,) = store.list()
    assert (summary.key, summary.in_use) == (IDENTITY.key, True)
    assert store.verify(IDENTITY.key).bad_extents == ()
    assert find_orphans(path.parent.parent) == ()
    image.close()


def test_a_read_only_cache_says_so_when_something_must_be_written(store: ImageStore, read_only) -> None:
    build_and_close(store)
    read_only()
    with pytest.raises(ImageFailure, match=r"(Read-only|Permission).*--cache-dir"):
        store.open_or_build(ImageIdentity("other", "1", "bfloat16"), build_image(1))
    with pytest.raises(ImageFailure, match=r"Read-only|Permission"):
        store.remove(IDENTITY.key)


# --- images built together ------------------------------------------------------------------------

SHARDS = tuple(replace(IDENTITY, shard=f"tp{rank}of2.pp0of1") for rank in range(2))


def build_each(built: list[ImageIdentity]) -> Callable[[list[ImageWriter]], None]:
    def build(writers: list[ImageWriter]) -> None:
        for writer in writers:
            built.append(writer.identity)
            build_image(1)(writer)

    return build


def test_images_of_one_pass_appear_together_and_are_built_once(store: ImageStore, tmp_path: Path) -> None:
    """Would catch a rank that converts the checkpoint again for itself."""
    built: list[ImageIdentity] = []
    for identity in (SHARDS[1], SHARDS[0]):
        image = store.open_or_build_one_of(identity, SHARDS, build_each(built))
        assert image.identity == identity
        image.close()
    assert built == list(SHARDS)
    assert leftovers(tmp_path) == []


def test_only_what_is_missing_is_built_again(store: ImageStore) -> None:
    store.open_or_build_one_of(SHARDS[0], SHARDS, build_each([])).close()
    store.remove(SHARDS[1].key)
    built: list[ImageIdentity] = []
    store.open_or_build_one_of(SHARDS[1], SHARDS, build_each(built)).close()
    assert built == [SHARDS[1]]


def test_none_of_a_pass_that_failed_appears(store: ImageStore, tmp_path: Path) -> None:
    def fail_at_the_second(writers: list[ImageWriter]) -> None:
        build_image(1)(writers[0])
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        store.open_or_build_one_of(SHARDS[0], SHARDS, fail_at_the_second)
    assert store.list() == ()
    assert leftovers(tmp_path) == []
