"""A checkpoint's tensors, cast and under the module's own names: streamed if they agree, else through transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shuteye.errors import UnsupportedModel
from shuteye.matrices.kinds import MatrixKind
from shuteye.matrices.stored import StoredMatrix
from shuteye.models.formats.files import (
    main_formats,
    open_weights,
    read_json,
    refusing,
    require_json,
    stored_formats,
    weight_files,
)
from shuteye.models.formats.gguf import ARCHITECTURES, open_gguf, unknown_formats
from shuteye.models.formats.gguf_config import config_of
from shuteye.models.formats.gguf_header import read_gguf_header
from shuteye.models.formats.gguf_modules import module_names
from shuteye.models.formats.quantized import QuantizedTensors, fitted
from shuteye.models.formats.quantized_safetensors import open_safetensors, quantization_config, quantization_label
from shuteye.models.modules import build_module, model_class, model_options, quiet, tied_names
from shuteye.models.sources import ModelSource


@dataclass(frozen=True, slots=True)
class CheckpointTensors:
    """Everything that a module needs of a checkpoint.

    Attributes:
        parameters: names in module order → shape, and the dtype that is computed in; tied ones only once.
        aliases: tied name → the name in `parameters` that holds its values.
        read: gives one parameter, cast; or as it is stored, if that is quantized.
        buffers: persistent buffers.
        stored: the kinds of those that are quantized.
        rope_factors: what each rotary frequency is to be divided by [head_dim / 2]; None: they are the config's.
    """

    parameters: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    aliases: Mapping[str, str]
    read: Callable[[str], torch.Tensor | StoredMatrix]
    buffers: Mapping[str, torch.Tensor]
    stored: Mapping[str, MatrixKind] = field(default_factory=dict)
    rope_factors: NDArray[np.float32] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters, were they of the dtype that is computed in."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.parameters.values())


def stored_as(source: ModelSource) -> str:
    """How the checkpoint's numbers are stored: `GGUF Q4_1`, `safetensors bfloat16`. Opens every file that matters.

    Raises:
        UnsupportedModel: one of them is damaged.
    """
    if source.kind == "gguf":
        return f"GGUF {main_formats(read_gguf_header(source.path).formats())}"
    require_json(source.path)
    if (config := quantization_config(source.path)) is not None:
        return f"safetensors {quantization_label(config)}"
    with ExitStack() as stack:
        return f"safetensors {main_formats(stored_formats(open_weights(weight_files(source.path), stack)))}"


def read_config(source: ModelSource) -> Any:
    """The transformers config of a checkpoint.

    Raises:
        UnsupportedModel: it is damaged, or transformers does not know the model type without running code from the
            checkpoint.
    """
    from transformers import AutoConfig

    where, extra = _location(source)
    with quiet(), refusing(f"{source.name}: its configuration cannot be used"):
        if source.kind == "gguf" and (header := read_gguf_header(source.path)).architecture in ARCHITECTURES:
            return AutoConfig.for_model(**config_of(header))
        return AutoConfig.from_pretrained(where, trust_remote_code=False, local_files_only=True, **extra)


def read_generation_config(source: ModelSource) -> dict[str, Any]:
    """generation_config.json as it is, or nothing.

    Raises:
        UnsupportedModel: it is damaged.
    """
    path = source.path / "generation_config.json"
    return {} if source.kind == "gguf" or not path.is_file() else read_json(path)


def save_tokenizer(source: ModelSource, directory: Path) -> None:
    """Write the checkpoint's tokenizer and chat template in the form that `shuteye.tokenizer` reads.

    Raises:
        UnsupportedModel: there is none, or it is not a fast one (tokenizer.json).
    """
    tokenizer = _read_tokenizer(source)
    with quiet():
        tokenizer.save_pretrained(directory)


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """What a checkpoint's tokenizer does beside tokenizing.

    Attributes:
        outputs: the model's arguments that it gives: `input_ids`, perhaps `token_type_ids`, …
        max_length: longest text in tokens that it was made for; astronomical if it does not say.
    """

    outputs: tuple[str, ...]
    max_length: int
    has_chat_template: bool


def read_tokenizer_facts(source: ModelSource) -> TokenizerSpec:
    """Load the checkpoint's tokenizer and ask it.

    Raises:
        UnsupportedModel: as `save_tokenizer`.
    """
    tokenizer = _read_tokenizer(source)
    return TokenizerSpec(
        tuple(tokenizer.model_input_names), int(tokenizer.model_max_length), bool(tokenizer.chat_template)
    )


def _tokenizer_class(source: ModelSource) -> Any:
    """The class that `AutoTokenizer` comes to; of a GGUF file in seconds, for which it parses all of it once more."""
    from transformers import CONFIG_MAPPING, TOKENIZER_MAPPING, AutoTokenizer, PreTrainedTokenizerFast

    if source.kind == "gguf" and (architecture := read_gguf_header(source.path).architecture) in ARCHITECTURES:
        return TOKENIZER_MAPPING.get(CONFIG_MAPPING[architecture], PreTrainedTokenizerFast)
    return AutoTokenizer


def _read_tokenizer(source: ModelSource) -> Any:
    where, extra = _location(source)
    with quiet(), refusing(f"{source.name}: its tokenizer cannot be read"):
        tokenizer = _tokenizer_class(source).from_pretrained(
            where, trust_remote_code=False, local_files_only=True, **extra
        )
    if not tokenizer.is_fast:
        raise UnsupportedModel(
            f"{source.name}: {type(tokenizer).__name__} is not a fast tokenizer; only those with a tokenizer.json "
            "are read, because the server decodes without transformers."
        )
    return tokenizer


@contextmanager
def open_checkpoint(
    source: ModelSource,
    config: Any,
    *,
    dtype: torch.dtype,
    streaming: bool = True,
    task: str = "generate",
    is_flat: bool = False,
    keeps_bits: bool = True,
) -> Iterator[CheckpointTensors]:
    """The tensors of a checkpoint for `task`; `streaming=False` always goes through transformers.

    Args:
        is_flat: the model is one that the flat loop computes, whose GGUF files are never left to transformers.
        keeps_bits: quantized matrices are wanted as they are stored; formats that kernels do not know are refused.
            False: they are to be dequantized, by transformers if need be.

    Raises:
        UnsupportedModel: a tensor that the model needs is missing or has another shape.
    """
    with ExitStack() as stack:
        tensors = None
        if streaming:
            module = build_module(config, dtype=dtype, attention="eager", task=task)
            stored = _open_quantized(source, stack, module, is_flat=is_flat, keeps_bits=keeps_bits)
            if stored is not None:
                tensors = _as_stored(source, module, stored, dtype)
            elif source.kind == "directory":
                tensors = _stream(source, module, dtype, stack)
        yield tensors or _load_whole(source, config, dtype, task=task)


def _location(source: ModelSource) -> tuple[str, dict[str, Any]]:
    if source.kind == "gguf":
        return str(source.path.parent), {"gguf_file": source.path.name}
    return str(source.path), {}


# --- as they are stored ---------------------------------------------------------------------------


def _open_quantized(
    source: ModelSource, stack: ExitStack, module: Any, *, is_flat: bool, keeps_bits: bool
) -> QuantizedTensors | None:
    """The tensors of a checkpoint that is quantized; None: it is not, or transformers is to dequantize it."""
    if source.kind == "gguf":
        if unknown_formats(source.path) and not (is_flat and keeps_bits):
            return None
        if is_flat:
            return stack.enter_context(open_gguf(source.path))
        names = module_names(module, read_gguf_header(source.path).architecture)
        if names is None or _persistent_buffers(module):
            return None
        return stack.enter_context(open_gguf(source.path, names))
    config = quantization_config(source.path)
    if config is None:
        return None
    stored = stack.enter_context(open_safetensors(source.path, config))
    if not is_flat and (_persistent_buffers(module) or _is_converted(module, [*stored.matrices, *stored.floats])):
        raise UnsupportedModel(
            f"{source.name} is quantized, and transformers would load its tensors changed or under other names, as "
            f"{type(module).__name__} has them; use the unquantized one."
        )
    return stored


def _as_stored(source: ModelSource, module: Any, stored: QuantizedTensors, dtype: torch.dtype) -> CheckpointTensors:
    """One tensor in memory at a time; the quantized ones are not touched."""
    ties = tied_names(module)
    wanted = {
        name: tuple(parameter.shape)
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if name not in ties
    }
    stored = fitted(source.name, stored, wanted)

    def read(name: str) -> torch.Tensor | StoredMatrix:
        found = stored.read(name)
        return torch.from_numpy(found).to(dtype) if isinstance(found, np.ndarray) else found

    kinds = {name: kind for name, (kind, _) in stored.matrices.items()}
    parameters = {name: (shape, dtype) for name, shape in wanted.items()}
    return CheckpointTensors(parameters, ties, read, {}, kinds, stored.rope_factors)


# --- tensor by tensor -----------------------------------------------------------------------------


def _stream(source: ModelSource, module: Any, dtype: torch.dtype, stack: ExitStack) -> CheckpointTensors | None:
    """One tensor in memory at a time; None if the checkpoint needs more than casting."""
    ties = tied_names(module)
    wanted = {
        name: tuple(parameter.shape)
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if name not in ties
    }
    stored = open_weights(weight_files(source.path), stack)
    if not _is_plain(module, wanted, stored, dtype):
        return None
    _require_floats(source, stored)

    def read(name: str) -> torch.Tensor:
        tensor: torch.Tensor = stored[name].get_tensor(name)
        return tensor.to(dtype)

    return CheckpointTensors({name: (shape, dtype) for name, shape in wanted.items()}, ties, read, {})


def _require_floats(source: ModelSource, stored: dict[str, Any]) -> None:
    """Refuse whole numbers, whose scales the checkpoint does not tell; cast, they would be served as weights."""
    for name, file in stored.items():
        kind = file.get_slice(name).get_dtype()
        if "F" not in kind:
            raise UnsupportedModel(
                f"{source.name}: {name} is stored as {kind}, expected a floating-point format. If the checkpoint is "
                "quantized, use the unquantized one or a .gguf file."
            )


def _is_plain(module: Any, wanted: dict[str, tuple[int, ...]], stored: dict[str, Any], dtype: torch.dtype) -> bool:
    """True if names and shapes agree one to one, and transformers would neither rename, convert nor keep any apart."""
    if _persistent_buffers(module) or set(stored) != set(wanted) or module._get_dtype_plan(dtype):
        return False
    if any(tuple(stored[name].get_slice(name).get_shape()) != shape for name, shape in wanted.items()):
        return False
    return not _is_converted(module, wanted)


def _persistent_buffers(module: Any) -> set[str]:
    return set(module.state_dict()) - {name for name, _ in module.named_parameters(remove_duplicate=False)}


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
            where,
            config=config,
            dtype=dtype,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report, by name, and refused
            **extra,
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
