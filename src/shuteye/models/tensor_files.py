"""Tensors of safetensors files on their way into a running model.

Knows nothing of models; names are those of the checkpoint.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from shuteye.errors import InvalidRequest


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
    try:
        return safe_open(path, framework="pt")
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{path} cannot be read on the server's host: {error}.", param="path") from error
    except SafetensorError as error:
        raise InvalidRequest(f"{path.name} is not a safetensors file: {error}.", param="path") from error
