"""Tensors of safetensors files on their way into a running model, and back into such a file.

Knows nothing of models; names are those of the checkpoint.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from shuteye.errors import InvalidRequest

_DTYPES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def safetensors_chunks(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[memoryview]:
    """A safetensors file of tensors, which may share memory, piece by piece: the header, then every tensor's bytes.

    Written here because the library's own writer makes a second file and renames it, or a copy of everything in memory;
    the format is at https://github.com/huggingface/safetensors#format.

    Raises:
        InvalidRequest: a number format that the file format has not.
    """
    given = {name: tensor.detach() for name, tensor in named_tensors}
    tensors = dict(
        sorted(given.items(), key=lambda item: -item[1].element_size())
    )  # so each is aligned to its elements
    header: dict[str, object] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _dtype_of(name, tensor), "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    yield memoryview(len(encoded).to_bytes(8, "little") + encoded)
    for tensor in filter(torch.numel, tensors.values()):
        yield tensor.cpu().reshape(-1).view(torch.uint8).numpy().data


def _dtype_of(name: str, tensor: torch.Tensor) -> str:
    if tensor.dtype not in _DTYPES:
        raise InvalidRequest(f"{name} is of {tensor.dtype}, which safetensors files cannot hold; cast it.", param=name)
    return _DTYPES[tensor.dtype]


@contextlib.contextmanager
def open_tensors(path: str) -> Iterator[Iterator[tuple[str, torch.Tensor]]]:
    """Every tensor of one file, or of all `*.safetensors` of a directory; read as they are asked for.

    Raises:
        InvalidRequest: there is no such file, or one that cannot be read; found before the first tensor.
    """
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_open(one)) for one in _files_of(Path(path))]
        yield ((name, file.get_tensor(name)) for file in files for name in file.keys())  # noqa: SIM118 (not a dict)


def _files_of(path: Path) -> list[Path]:
    try:
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"The path cannot be read on the server's host: {error}.", param="path") from error
    if not files:
        raise InvalidRequest(f"There is no .safetensors file in {path} on the server's host.", param="path")
    return files


def _open(path: Path) -> safe_open:
    if path.exists() and not path.is_file():  # opening a pipe waits for its other end, and the engine with it
        raise InvalidRequest(f"{path} on the server's host is not a regular file.", param="path")
    try:
        return safe_open(path, framework="pt")
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{path} cannot be read on the server's host: {error}.", param="path") from error
    except SafetensorError as error:
        raise InvalidRequest(f"{path} is not a safetensors file: {error}.", param="path") from error
