"""A checkpoint's tensors, cast and under the module's own names: streamed if they agree, else through transformers.

Knows nothing of images or arenas.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shuteye.config import DType
from shuteye.errors import UnsupportedModel
from shuteye.models.blueprint import build_module, quiet, tied_names
from shuteye.models.sources import ModelSource
from shuteye.models.tasks import model_class, model_options

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class CheckpointTensors:
    """Everything that a module needs of a checkpoint.

    Attributes:
        parameters: names in module order → shape and dtype; tied ones only once.
        aliases: tied name → the name in `parameters` that holds its values.
        read: gives one parameter, cast.
        buffers: persistent buffers.
    """

    parameters: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    aliases: Mapping[str, str]
    read: Callable[[str], torch.Tensor]
    buffers: Mapping[str, torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.parameters.values())


def resolve_dtype(source: ModelSource, wanted: DType) -> torch.dtype:
    """The dtype to serve in; "auto" is the checkpoint's, with float16 (slow on CPU) and packed formats as bfloat16."""
    if wanted != "auto":
        return _DTYPES[wanted]
    if source.kind == "gguf":
        return torch.bfloat16
    config = json.loads((source.path / "config.json").read_text())
    named = config.get("dtype") or config.get("torch_dtype") or _stored_dtype(source.path)
    return torch.float32 if named in ("float32", "F32", "float64", "F64") else torch.bfloat16


def _stored_dtype(directory: Path) -> str:
    """The dtype of the first tensor of numbers of the first safetensors file, as its header spells it."""
    with min(directory.glob("*.safetensors")).open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    dtypes = (entry["dtype"] for name, entry in header.items() if name != "__metadata__")
    return next((dtype for dtype in dtypes if "F" in dtype), "BF16")


def read_config(source: ModelSource) -> Any:
    """The transformers config of a checkpoint.

    Raises:
        UnsupportedModel: transformers does not know the model type without running code from the checkpoint.
    """
    from transformers import AutoConfig

    where, extra = _location(source)
    with quiet():
        try:
            return AutoConfig.from_pretrained(where, trust_remote_code=False, local_files_only=True, **extra)
        except ValueError as error:
            raise UnsupportedModel(f"{source.name}: its configuration cannot be used: {error}") from error


def read_generation_config(source: ModelSource) -> dict[str, Any]:
    """generation_config.json as it is, or nothing."""
    path = source.path / "generation_config.json"
    if source.kind == "gguf" or not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def save_tokenizer(source: ModelSource, directory: Path) -> None:
    """Write the checkpoint's tokenizer and chat template in the form that `shuteye.tokenizer` reads.

    Raises:
        UnsupportedModel: there is none, or it is not a fast one (tokenizer.json).
    """
    tokenizer = _read_tokenizer(source)
    with quiet():
        tokenizer.save_pretrained(directory)


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """What a checkpoint's tokenizer does beside tokenizing.

    Attributes:
        outputs: the model's arguments that it gives: `input_ids`, perhaps `token_type_ids`, …
        max_length: longest text in tokens that it was made for; astronomical if it does not say.
    """

    outputs: tuple[str, ...]
    max_length: int
    has_chat_template: bool


def read_tokenizer_facts(source: ModelSource) -> TokenizerFacts:
    """Load the checkpoint's tokenizer and ask it.

    Raises:
        UnsupportedModel: as `save_tokenizer`.
    """
    tokenizer = _read_tokenizer(source)
    return TokenizerFacts(
        tuple(tokenizer.model_input_names), int(tokenizer.model_max_length), bool(tokenizer.chat_template)
    )


def _read_tokenizer(source: ModelSource) -> Any:
    from transformers import AutoTokenizer

    where, extra = _location(source)
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False, local_files_only=True, **extra)
        except (ValueError, OSError, ImportError) as error:
            raise UnsupportedModel(f"{source.name}: its tokenizer cannot be read: {error}") from error
    if not tokenizer.is_fast:
        raise UnsupportedModel(
            f"{source.name}: {type(tokenizer).__name__} is not a fast tokenizer; only those with a tokenizer.json "
            "are read, because the server decodes without transformers."
        )
    return tokenizer


@contextmanager
def open_checkpoint(
    source: ModelSource, config: Any, *, dtype: torch.dtype, streaming: bool = True, task: str = "generate"
) -> Iterator[CheckpointTensors]:
    """The tensors of a checkpoint for `task`; `streaming=False` always goes through transformers.

    Raises:
        UnsupportedModel: a tensor that the model needs is missing or has another shape.
    """
    with ExitStack() as stack:
        streams = streaming and source.kind == "directory"
        tensors = _stream(source, config, dtype, stack, task=task) if streams else None
        yield tensors or _load_whole(source, config, dtype, task=task)


def _location(source: ModelSource) -> tuple[str, dict[str, Any]]:
    if source.kind == "gguf":
        return str(source.path.parent), {"gguf_file": source.path.name}
    return str(source.path), {}


# --- tensor by tensor -----------------------------------------------------------------------------


def _stream(
    source: ModelSource, config: Any, dtype: torch.dtype, stack: ExitStack, *, task: str
) -> CheckpointTensors | None:
    """One tensor in memory at a time; None if the checkpoint needs more than casting."""
    module = build_module(config, dtype=dtype, attention="eager", task=task)
    ties = tied_names(module)
    wanted = {
        name: tuple(parameter.shape)
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if name not in ties
    }
    stored = _open_files(source.path, stack)
    if stored is None or not _is_plain(module, wanted, stored, dtype):
        return None

    def read(name: str) -> torch.Tensor:
        tensor: torch.Tensor = stored[name].get_tensor(name)
        return tensor.to(dtype)

    return CheckpointTensors({name: (shape, dtype) for name, shape in wanted.items()}, ties, read, {})


def _open_files(directory: Path, stack: ExitStack) -> dict[str, Any] | None:
    """Tensor name → the open file that holds it; the files are those that transformers would read."""
    from safetensors import safe_open

    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").is_file():
        files = [directory / "model.safetensors"]
    elif index.is_file():
        files = [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    else:
        return None
    opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
    return {name: file for file in opened for name in file.keys()}  # noqa: SIM118  not a mapping


def _is_plain(module: Any, wanted: dict[str, tuple[int, ...]], stored: dict[str, Any], dtype: torch.dtype) -> bool:
    """True if names and shapes agree one to one, and transformers would neither rename, convert nor keep any apart."""
    persistent = set(module.state_dict()) - {name for name, _ in module.named_parameters(remove_duplicate=False)}
    if persistent or set(stored) != set(wanted) or module._get_dtype_plan(dtype):
        return False
    if any(tuple(stored[name].get_slice(name).get_shape()) != shape for name, shape in wanted.items()):
        return False
    return not _is_converted(module, wanted)


def _is_converted(module: Any, names: Iterable[str]) -> bool:
    """True if transformers would load any of these tensors under another name, or changed."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(module)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    if len(renamings) + len(converters) != len(transforms):
        return True  # a kind of transform that is new to us
    return any(rename_source_key(name, renamings, converters) != (name, None) for name in names)


# --- through transformers -------------------------------------------------------------------------


def _load_whole(source: ModelSource, config: Any, dtype: torch.dtype, *, task: str) -> CheckpointTensors:
    """The whole model in memory: for packed formats, and where transformers renames or converts."""
    from transformers import GgufConfig

    where, extra = _location(source)
    if source.kind == "gguf":
        # Without this transformers keeps the weights packed.
        extra["quantization_config"] = GgufConfig(dequantize=True)
    found = model_class(config, task)
    extra |= model_options(found, task)
    with quiet():
        model, report = found.from_pretrained(
            where, config=config, dtype=dtype, local_files_only=True, output_loading_info=True, **extra
        )
    _check_report(source, report)
    parameters: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = owners.setdefault(id(parameter), name)
        if owner == name:
            parameters[name] = parameter.detach()
        else:
            aliases[name] = owner
    buffers = {name: value for name, value in model.state_dict().items() if name not in parameters | aliases}
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in parameters.items()}
    return CheckpointTensors(shapes, aliases, parameters.__getitem__, buffers)


def _check_report(source: ModelSource, report: Mapping[str, Any]) -> None:
    """Transformers fills what is missing with random numbers and only logs it; that must not be served."""
    for what in ("missing_keys", "mismatched_keys", "error_msgs", "conversion_errors"):
        if found := report.get(what):
            some = ", ".join(sorted(str(each) for each in found)[:5])
            raise UnsupportedModel(f"{source.name}: the checkpoint does not fit the model, {what}: {some}")
