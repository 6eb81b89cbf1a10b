"""Reading an image: what was written comes back, and damage of every kind is told, never served."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from memory_harness import PAGE, SPECS, TEMPLATE, open_fds, unseal

from shuteye.errors import ImageFailure
from shuteye.memory.image import (
    BUFFERS_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    ImageIdentity,
    WeightImage,
    encode_index,
    read_index,
)
from shuteye.memory.image_files import checksum_hex, checksum_of_file
from shuteye.models.tensors import buffers_of

IDENTITY = ImageIdentity("HuggingFaceTB/SmolLM2-135M-Instruct", "abc", "bfloat16")


@pytest.fixture
def path(image_paths: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy to damage."""
    return unseal(Path(shutil.copytree(image_paths[0], tmp_path / "image")))


@pytest.fixture
def image(path: Path) -> Iterator[WeightImage]:
    image = WeightImage.open(path)
    yield image
    image.close()


def test_every_tensor_is_where_the_index_says(image: WeightImage) -> None:
    content = (image.path / WEIGHTS_FILE).read_bytes()
    for spec in SPECS:
        slot = image.layout.slots[spec.name]
        assert content[slot.offset : slot.end] == random.Random(f"1 {spec.name}").randbytes(spec.nbytes)
    assert len(content) == image.layout.nbytes == 7 * PAGE


def test_names_aliases_metadata_and_buffers_come_back(image: WeightImage) -> None:
    assert (image.slot_name("embed"), image.slot_name("head"), image.slot_name("tail")) == ("embed", "embed", None)
    assert image.metadata == {"seed": 1}
    assert buffers_of(image)["scale"].equal(torch.tensor([1.5, 2.5]))


def test_an_undamaged_image_has_no_damaged_extents_and_a_flipped_bit_is_found(image: WeightImage) -> None:
    assert image.damaged_extents() == ()
    weights = image.path / WEIGHTS_FILE
    weights.chmod(0o644)
    with weights.open("r+b") as file:
        byte = os.pread(file.fileno(), 1, 4 * PAGE - 1)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1]), 4 * PAGE - 1)
    assert image.damaged_extents() == (1,)


@pytest.mark.parametrize("nbytes", [0, PAGE, 8 * PAGE])
def test_a_file_of_another_size_is_refused_whatever_is_in_it(image: WeightImage, nbytes: int) -> None:
    """Would catch a message that says nothing of the cause, and a file that somebody is appending to."""
    image.require_intact()
    os.truncate(image.path / WEIGHTS_FILE, nbytes)
    with pytest.raises(ImageFailure, match=f"was changed while in use: {nbytes:,} bytes instead of {7 * PAGE:,}"):
        image.require_intact()


def test_a_file_that_was_touched_is_read_once(image: WeightImage, monkeypatch) -> None:
    """Would catch a look that reads all of the file before every step after somebody's chmod."""
    reads, damaged_extents = [], image.damaged_extents
    monkeypatch.setattr(image, "damaged_extents", lambda: reads.append(1) or damaged_extents())
    for _ in range(3):
        image.require_intact()
    assert len(reads) == 0
    (image.path / WEIGHTS_FILE).chmod(0o600)
    for _ in range(3):
        image.require_intact()
    assert len(reads) == 1


def rewrite_index(path: Path, change) -> None:
    plain = json.loads((path / INDEX_FILE).read_bytes())
    change(plain)
    (path / INDEX_FILE).write_text(json.dumps(plain))


def damage_version(path: Path) -> None:
    rewrite_index(path, lambda plain: plain.update(format=99))


def damage_content(path: Path) -> None:
    rewrite_index(path, lambda plain: plain["index"]["layout"]["slots"]["mlp"].update(offset=0))


def damage_truncated(path: Path) -> None:
    (path / INDEX_FILE).write_bytes((path / INDEX_FILE).read_bytes()[:-10])


def damage_checksums(path: Path) -> None:
    index = read_index(path)
    object.__setattr__(index, "checksums", index.checksums[1:])
    (path / INDEX_FILE).write_bytes(encode_index(index))


def damage_aliases(path: Path) -> None:
    index = read_index(path)
    object.__setattr__(index, "aliases", {"head": "nobody"})
    (path / INDEX_FILE).write_bytes(encode_index(index))


def damage_size(path: Path) -> None:
    (path / WEIGHTS_FILE).chmod(0o644)
    os.truncate(path / WEIGHTS_FILE, 6 * PAGE)


def damage_pages(path: Path) -> None:
    index = read_index(path)
    layout = replace(index.layout, page_bytes=64)
    (path / INDEX_FILE).write_bytes(encode_index(replace(index, layout=layout)))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_version, "another version of shuteye made it .format 99"),
        (damage_content, "does not match its own checksum"),
        (damage_truncated, "truncated"),
        (damage_checksums, "3 checksums for 4 extents"),
        (damage_aliases, "aliases of unknown tensors: nobody"),
        (damage_size, r"has 24,576 bytes instead of 28,672"),
        (damage_pages, "its pages are 64 bytes"),
        (lambda path: (path / INDEX_FILE).unlink(), "No such file"),
        (lambda path: (path / WEIGHTS_FILE).unlink(), "No such file"),
        (lambda path: (path / BUFFERS_FILE).unlink(), f"{BUFFERS_FILE} is missing"),
        (lambda path: (path / TEMPLATE).unlink(), f"{TEMPLATE} is missing"),
        (lambda path: (path / TEMPLATE).write_text(""), f"{TEMPLATE} has 0 bytes instead of 14"),
        (lambda path: shutil.rmtree(path / "tokenizer"), f"{TEMPLATE} is missing"),
        (lambda path: (path / "tokenizer" / "vocab.json").write_text("{}"), "tokenizer/vocab.json was added to it"),
    ],
)
def test_a_damaged_image_is_refused_with_the_reason_and_the_cure(path: Path, damage, reason: str) -> None:
    before = open_fds()
    damage(path)
    with pytest.raises(ImageFailure, match=rf"(?s){reason}.*shuteye images rm image"):
        WeightImage.open(path)
    assert open_fds() == before, "a descriptor, and its lock, leaked"


@pytest.mark.parametrize("name", [TEMPLATE, BUFFERS_FILE])
def test_a_changed_file_beside_the_weights_is_refused_by_name(image: WeightImage, name: str) -> None:
    """Would catch another chat template that is served as if it were the model's."""
    nbytes = image.require_files_unchanged()
    content = (image.path / name).read_bytes()
    assert nbytes == sum((image.path / one).stat().st_size for one in (TEMPLATE, BUFFERS_FILE))
    (image.path / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ImageFailure, match=f"{name} does not match its checksum. Run `shuteye images rm image`"):
        image.require_files_unchanged()


def test_of_many_bad_files_some_are_named_and_all_are_counted(path: Path) -> None:
    """Would catch a line of a thousand names, or one that hides how much is wrong."""
    for number in range(5):
        (path / f"added{number}").touch()
    with pytest.raises(ImageFailure, match=r"added0 was added to it; .*added2 was added to it, and 2 files more"):
        WeightImage.open(path)


def test_hidden_files_do_not_count_as_damage(path: Path) -> None:
    """Would catch an image that is rebuilt because a backup or a file system left a mark in it."""
    (path / ".nfs0001").touch()
    WeightImage.open(path).close()


def test_damaged_buffers_are_refused(image: WeightImage) -> None:
    (image.path / BUFFERS_FILE).write_bytes(b"other")
    with pytest.raises(ImageFailure, match=BUFFERS_FILE):
        image.read_buffers()


def test_an_image_that_is_not_there_is_not_damaged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        WeightImage.open(tmp_path / "nothing")


def test_keys_are_readable_and_differ_with_every_field() -> None:
    assert IDENTITY.key.startswith("smollm2-135m-instruct-bfloat16-")
    others = [replace(IDENTITY, source="x/SmolLM2-135M-Instruct"), replace(IDENTITY, fingerprint="abd")]
    others += [replace(IDENTITY, dtype="float32"), replace(IDENTITY, shard="tp0of2.pp0of1")]
    assert len({IDENTITY.key, *(other.key for other in others)}) == 5
    assert "-tp0of2.pp0of1-" in others[-1].key


def test_a_whole_images_key_is_what_it_was_before_there_were_shards_and_forms() -> None:
    """Would catch a change that converts every model anew."""
    assert IDENTITY.key == "smollm2-135m-instruct-bfloat16-2c7f207f3f67"
    assert replace(IDENTITY, form="q4_0").key.startswith("smollm2-135m-instruct-bfloat16-q4_0-")


@pytest.mark.parametrize("source", ["", "/", "..", "../../etc/passwd", "a b\0c/ü", "x" * 500])
def test_no_source_makes_a_key_that_leaves_the_directory(source: str) -> None:
    key = ImageIdentity(source, "f", "float32").key
    assert Path(key).name == key
    assert not key.startswith((".", "-"))
    assert len(key) < 100


def test_a_file_is_hashed_in_pieces_like_a_whole(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("shuteye.memory.image_files._READ_BYTES", 7)
    content = random.Random(0).randbytes(100)
    (tmp_path / "file").write_bytes(content)
    with (tmp_path / "file").open("rb") as file:
        assert checksum_of_file(file.fileno(), 3, 90) == checksum_hex(content[3:93])
        with pytest.raises(OSError, match="ends at 100 instead of 101"):
            checksum_of_file(file.fileno(), 3, 98)


def test_closing_twice_is_harmless(path: Path) -> None:
    image = WeightImage.open(path)
    image.close()
    image.close()
    assert image.closed


def meddle_before_lock(monkeypatch: pytest.MonkeyPatch, meddle: Callable[[], object]) -> None:
    """Let `meddle` happen after the file is opened and before it is locked, once."""
    lock = fcntl.flock
    pending = [meddle]

    def late_lock(fd: int, operation: int) -> None:
        while pending:
            pending.pop()()
        lock(fd, operation)

    monkeypatch.setattr("fcntl.flock", late_lock)


def test_an_image_removed_before_it_could_be_locked_is_gone_not_damaged(path: Path, monkeypatch) -> None:
    meddle_before_lock(monkeypatch, lambda: shutil.rmtree(path))
    with pytest.raises(FileNotFoundError):
        WeightImage.open(path)


def test_an_image_replaced_before_it_could_be_locked_is_the_new_one(
    path: Path, image_paths: tuple[Path, Path], monkeypatch
) -> None:
    """Else the new index would be served with the old weights."""

    def replace_image() -> None:
        shutil.rmtree(path)
        shutil.copytree(image_paths[1], path)

    meddle_before_lock(monkeypatch, replace_image)
    image = WeightImage.open(path)
    assert image.metadata == {"seed": 2}
    assert image.damaged_extents() == ()
    image.close()
