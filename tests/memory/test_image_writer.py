"""Writing an image: every tensor once, of the right shape, or no image at all."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shuteye.errors import ImageFailure
from shuteye.memory.image import INDEX_FILE, WEIGHTS_FILE, ImageIdentity, WeightImage
from shuteye.memory.image_writer import ImageWriter
from shuteye.memory.layout import TensorSpec
from shuteye.models.tensors import as_bytes, buffers_of

PAGE = 4096
SPECS = (TensorSpec("a", (2, 3), "bfloat16", "one"), TensorSpec("b", (4,), "float32", "two"))


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[ImageWriter]:
    writer = ImageWriter(tmp_path, ImageIdentity("m", "f", "bfloat16"), page_bytes=PAGE)
    yield writer
    writer.close()


def test_tensors_of_any_order_stride_and_device_form_land_in_their_slots(writer: ImageWriter) -> None:
    writer.begin(SPECS)
    a = torch.arange(6, dtype=torch.bfloat16).view(3, 2).t()
    writer.put("b", as_bytes(torch.arange(4.0, requires_grad=True)))
    writer.put("a", as_bytes(a))
    writer.finish()
    image = WeightImage.open(writer.directory)
    content = (writer.directory / WEIGHTS_FILE).read_bytes()
    assert torch.frombuffer(bytearray(content[:12]), dtype=torch.bfloat16).view(2, 3).equal(a)
    assert torch.frombuffer(bytearray(content[PAGE : PAGE + 16]), dtype=torch.float32).tolist() == [0, 1, 2, 3]
    assert image.damaged_extents() == ()
    assert image.read_buffers() == {}
    image.close()


def test_a_new_image_is_not_left_in_the_page_cache(writer: ImageWriter) -> None:
    """Would catch wakes that map small pieces, one by one, until the machine runs out of memory or is restarted."""
    writer.begin([TensorSpec("a", (1 << 20,), "float32"), TensorSpec("b", (1 << 20,), "float32")])
    for name in ("b", "a"):
        writer.put(name, as_bytes(torch.ones(1 << 20)))
    writer.finish()
    with (writer.directory / WEIGHTS_FILE).open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) as mapping:
        num_pages = len(mapping) // mmap.PAGESIZE
        cached = (ctypes.c_ubyte * num_pages)()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapping)), cached) == 0
        assert sum(page & 1 for page in cached) < num_pages // 10


@pytest.mark.parametrize("data", [bytes(12), bytearray(12), memoryview(bytes(12)), memoryview(bytes(12)).cast("h")])
def test_raw_bytes_are_taken_as_they_are(writer: ImageWriter, data) -> None:
    writer.begin(SPECS)
    writer.put("a", data)
    with pytest.raises(ImageFailure, match="must have 16 bytes, got 12"):
        writer.put("b", data)


def test_an_empty_tensor_and_a_scalar_are_tensors_too(writer: ImageWriter) -> None:
    writer.begin([TensorSpec("none", (0, 4), "float32"), TensorSpec("one", (), "int64")])
    writer.put("none", as_bytes(torch.empty(0, 4)))
    writer.put("one", as_bytes(torch.tensor(5)))
    writer.put_buffer("empty", as_bytes(torch.empty(0)))
    writer.put_buffer("steps", as_bytes(torch.tensor(3)))
    writer.finish()
    image = WeightImage.open(writer.directory)
    buffers = buffers_of(image)
    assert (buffers["empty"].shape, buffers["steps"].item()) == ((0,), 3)
    image.close()


@pytest.mark.parametrize(
    ("name", "tensor", "complaint"),
    [
        ("c", torch.zeros(1), "'c' is not in the layout"),
        ("a", torch.zeros(3, 2, dtype=torch.bfloat16), r"must be bfloat16 \(2, 3\), got bfloat16 \(3, 2\)"),
        ("a", torch.zeros(2, 3), r"must be bfloat16 \(2, 3\), got float32 \(2, 3\)"),
        ("b", torch.zeros(4), "'b' was put twice"),
    ],
)
def test_what_does_not_belong_is_refused(writer: ImageWriter, name: str, tensor, complaint: str) -> None:
    writer.begin(SPECS)
    writer.put("b", as_bytes(torch.zeros(4)))
    with pytest.raises(ImageFailure, match=complaint):
        writer.put(name, as_bytes(tensor))


def test_a_forgotten_tensor_is_named_and_no_index_is_written(writer: ImageWriter) -> None:
    writer.begin(SPECS)
    writer.put("b", as_bytes(torch.zeros(4)))
    with pytest.raises(ImageFailure, match=r"1 tensors of m-bfloat16-\w+ were never written, such as a"):
        writer.finish()
    assert not (writer.directory / INDEX_FILE).exists()


def test_a_builder_that_does_nothing_is_told(writer: ImageWriter) -> None:
    with pytest.raises(ImageFailure, match="never called begin"):
        writer.finish()


@pytest.mark.parametrize("nbytes", [1 << 30, 100 * PAGE])
def test_a_disk_without_room_is_found_before_the_first_byte(writer: ImageWriter, monkeypatch, nbytes: int) -> None:
    """Would catch a reserve that is called the size of a small image."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 64 << 20})())
    says = (
        rf"the weights take {nbytes:,} bytes, 67,108,864 more must stay free, and only 67,108,864 are free.*--cache-dir"
    )
    with pytest.raises(ImageFailure, match=says):
        writer.begin([TensorSpec("big", (nbytes,), "uint8")])
    assert list(writer.directory.iterdir()) == []


def test_a_write_error_is_reported_with_the_place(writer: ImageWriter, monkeypatch) -> None:
    writer.begin(SPECS)

    def refuse(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", refuse)
    with pytest.raises(ImageFailure, match=rf"{writer.directory} failed: .*No space left"):
        writer.put("a", bytes(12))


def test_a_layout_comes_from_begin_so_that_builders_can_plan(writer: ImageWriter) -> None:
    layout = writer.begin(SPECS)
    assert [extent.nbytes for extent in layout.extents] == [PAGE, PAGE]
    with pytest.raises(AssertionError, match="once"):
        writer.begin(SPECS)


def test_weights_have_a_name_only_once_they_are_sealed(writer: ImageWriter) -> None:
    """Would catch a killed conversion that leaves the whole weights on disk."""
    writer.begin(SPECS)
    assert list(writer.directory.iterdir()) == []
    writer.put("a", bytes(12))
    writer.put("b", bytes(16))
    writer.finish()
    assert (writer.directory / WEIGHTS_FILE).stat().st_size == 2 * PAGE


def test_a_file_system_without_nameless_files_gets_a_named_one(writer: ImageWriter, monkeypatch) -> None:
    really_open = os.open

    def refusing(path, flags, *arguments, **options):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return really_open(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", refusing)
    writer.begin(SPECS)
    writer.put("a", bytes(12))
    writer.put("b", bytes(16))
    writer.finish()
    image = WeightImage.open(writer.directory)
    assert image.damaged_extents() == ()
    image.close()
