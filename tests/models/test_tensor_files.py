"""Tensors into safetensors files, and out of them."""

import os

import pytest
import torch
from safetensors.torch import load

from shuteye.errors import InvalidRequest
from shuteye.models.weight_updates import open_tensors, safetensors_chunks


def test_the_library_reads_what_is_written():
    """Would catch bytes at wrong offsets, or formats, shapes and views that the writer gets wrong."""
    both = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    tensors = {
        "transposed": both.T,
        "row": both[1],
        "bf16": torch.tensor([1.5, -2.0, 3.25], dtype=torch.bfloat16),
        "fp8": torch.tensor([0.5, 2.0]).to(torch.float8_e4m3fn),
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "empty": torch.ones(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "an \u00e9": torch.ones(1, dtype=torch.uint8),
    }
    read = load(b"".join(safetensors_chunks(tensors.items())))
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read[name].float(), tensor.detach().float()), name


def test_what_the_format_cannot_hold_is_refused():
    """Would catch a KeyError."""
    with pytest.raises(InvalidRequest, match="complex64"):
        list(safetensors_chunks([("a", torch.ones(1, dtype=torch.complex64))]))


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    """Would catch an engine that hangs for ever, holding the interpreter, over the path of one update."""
    os.mkfifo(tmp_path / "weights.safetensors")
    for path in (tmp_path, tmp_path / "weights.safetensors"):
        with pytest.raises(InvalidRequest, match="not a regular file"), open_tensors(str(path)):
            pass
