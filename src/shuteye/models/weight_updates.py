"""Other weights for a running model: tensors of safetensors files, and which image may take the place of another.

Facts, config, buffers and tokenizer are read once, when a model is bound: an image that differs in one of them is
another model, whose weights alone would make nonsense.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from shuteye.errors import InvalidRequest, MemoryExhausted
from shuteye.handover import NamelessFile
from shuteye.matrices.kinds import ROWS
from shuteye.memory.arena import Arena
from shuteye.memory.image import WeightImage
from shuteye.memory.layout import Slot
from shuteye.models.binding import CONFIG_DIR, TOKENIZER_DIR, read_image_config
from shuteye.models.image_content import packed_tensor
from shuteye.models.tensors import as_bytes, slot_view, torch_dtype

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
        yield as_bytes(tensor).content


def tensor_file(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> NamelessFile:
    """A safetensors file of tensors, which may share memory; close it when it has been read.

    Raises:
        InvalidRequest: a number format that such files do not know.
        MemoryExhausted: there is no room for them.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = NamelessFile()
            stack.callback(file.close)
            for chunk in safetensors_chunks(named_tensors):
                file.write(chunk)
        except OSError as error:
            raise MemoryExhausted(
                f"The tensors do not fit in shared memory ({error.strerror}); update fewer at once, or from a file."
            ) from error
        stack.pop_all()
    return file


def write_tensor(arena: Arena, slot: Slot, tensor: torch.Tensor) -> None:
    """Cast a tensor of the slot's shape, and write it to its place, which is not quantized."""
    if slot.kind == ROWS.name:
        slot_view(arena, slot).copy_(tensor.detach())
        return
    packed = packed_tensor(tensor.detach().to(torch_dtype(slot.dtype)), slot.matrix_kind)
    arena.bytes_view(slot.offset, slot.nbytes)[:] = packed


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
        files = [stack.enter_context(_open(one)) for one in tensor_files(path)]
        yield ((name, file.get_tensor(name)) for file in files for name in file.keys())  # noqa: SIM118 (not a dict)


@contextlib.contextmanager
def open_shapes(path: str) -> Iterator[Iterator[tuple[str, tuple[int, ...]]]]:
    """`open_tensors` for the shapes alone, of which the files' headers tell."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_open(one)) for one in tensor_files(path)]
        yield ((name, tuple(file.get_slice(name).get_shape())) for file in files for name in file.keys())  # noqa: SIM118


def tensor_files(path: str) -> list[Path]:
    """The file itself, or every `*.safetensors` of a directory.

    Raises:
        InvalidRequest: there is none, or the directory cannot be read.
    """
    directory = Path(path)
    try:
        files = sorted(directory.glob("*.safetensors")) if directory.is_dir() else [directory]
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


_NO_MATTER = frozenset({
    *("transformers", "transformers_version", "_name_or_path", "name_or_path", "_from_model_config"),  # who wrote it
    "origin",  # where it was found, and in what bits
    *("dtype", "torch_dtype"),  # of the checkpoint; what is served in is the layout's
    *("use_cache", "gradient_checkpointing"),  # of training
    *("is_local", "local_files_only", "model_max_length", "padding_side", "truncation_side"),  # of transformers' calls
})  # fmt: skip
"""Keys that change nothing in what is served."""

_ABSENT = "absent"
_MAX_NAMED = 4
_MAX_SHOWN = 60


def refuse_other_model(bound: WeightImage, other: WeightImage) -> None:
    """Refuse an image that holds more than other weights for the model bound to `bound`.

    Raises:
        InvalidRequest: names the first differences.
        ImageFailure: one of them is damaged.
    """
    found = tuple(differences(bound, other))
    if not found:
        return
    more = f", and {len(found) - _MAX_NAMED} more" if len(found) > _MAX_NAMED else ""
    raise InvalidRequest(
        f"The checkpoint is another model than the one being served: {'; '.join(found[:_MAX_NAMED])}{more}. A reload "
        "replaces weights alone, and everything else must be as it is. Serve the checkpoint from a new engine, or, if "
        "only its weights are meant, put the served model's config and tokenizer files beside them.",
        param="path",
    )


def differences(bound: WeightImage, other: WeightImage) -> Iterator[str]:
    """What of `other` a model bound to `bound` would not heed, described one by one; what people wrote comes first.

    Raises:
        ImageFailure: buffers cannot be read.
    """
    yield from _config_differences(bound, other)
    yield from _value_differences(bound.metadata, other.metadata)
    if bound.metadata.get("task") == "transcribe":  # of the other tasks, all that is read of them is in the metadata
        for name in ("generation_config.json", "preprocessor_config.json"):
            yield from _json_differences(bound.path / CONFIG_DIR / name, other.path / CONFIG_DIR / name)
    yield from _value_differences(dict(bound.aliases), dict(other.aliases), what="tied tensor ")
    yield from _buffer_differences(bound, other)
    yield from _tokenizer_differences(bound.path / TOKENIZER_DIR, other.path / TOKENIZER_DIR)


def _config_differences(bound: WeightImage, other: WeightImage) -> Iterator[str]:
    """Read by transformers where the files differ: versions of it write other defaults down."""
    ours, theirs = (_content(image.path / CONFIG_DIR / "config.json") for image in (bound, other))
    if ours != theirs:
        yield from _value_differences(read_image_config(bound).to_dict(), read_image_config(other).to_dict())


def _buffer_differences(bound: WeightImage, other: WeightImage) -> Iterator[str]:
    ours, theirs = bound.read_buffers(), other.read_buffers()
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs:
            yield f"buffer {name} {_is_there(name in ours)} → {_is_there(name in theirs)}"
        elif not ours[name].same_as(theirs[name]):
            yield f"values of buffer {name}"


def _tokenizer_differences(ours: Path, theirs: Path) -> Iterator[str]:
    names = {path.relative_to(root).as_posix() for root in (ours, theirs) for path in root.rglob("*") if path.is_file()}
    for name in sorted(names, key=lambda name: (not name.endswith("tokenizer_config.json"), name)):
        if name == "tokenizer_config.json":
            yield from _json_differences(ours / name, theirs / name)
        elif _content(ours / name) != _content(theirs / name):
            yield f"{name} of the tokenizer"


def _json_differences(ours: Path, theirs: Path) -> Iterator[str]:
    before, after = _content(ours), _content(theirs)
    if before != after:
        yield from _value_differences(json.loads(before or "{}"), json.loads(after or "{}"), what=f"{ours.name}: ")


def _value_differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], *, what: str = "") -> Iterator[str]:
    before, after = dict(_flat(ours)), dict(_flat(theirs))
    for name in dict.fromkeys((*before, *after)):
        seen, wanted = before.get(name, _ABSENT), after.get(name, _ABSENT)
        if seen != wanted:
            yield f"{what}{name} {_shown(seen)} → {_shown(wanted)}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if key in _NO_MATTER:
            continue
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _is_there(there: bool) -> str:
    return "present" if there else _ABSENT


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 1]}…"
