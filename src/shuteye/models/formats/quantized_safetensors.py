"""The tensors of safetensors files whose modules a quantizer has packed, as its `quantization_config` says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shuteye.errors import UnsupportedModel
from shuteye.matrices.stored import Groups
from shuteye.models.formats.awq import Awq
from shuteye.models.formats.compressed_tensors import CompressedTensors
from shuteye.models.formats.files import damaged, open_weights, read_json, refusing, weight_files
from shuteye.models.formats.gptq import Gptq
from shuteye.models.formats.packed_integers import (
    SCALE_DTYPES,
    IntegerFormat,
    Module,
    matrix_kind,
    read_floats,
    read_groups,
)
from shuteye.models.formats.quantized import QuantizedTensors

_FORMATS: dict[str, Callable[[Mapping[str, Any]], IntegerFormat]] = {
    "compressed-tensors": CompressedTensors,
    "gptq": Gptq,
    "awq": Awq,
}


def quantization_config(directory: Path) -> Mapping[str, Any] | None:
    """How a checkpoint says that it is quantized; None: it is not.

    Raises:
        UnsupportedModel: its config.json is damaged.
    """
    path = directory / "config.json"
    config = read_json(path)
    found = config.get("quantization_config", config.get("compression_config"))
    if found is not None and not isinstance(found, dict):
        raise damaged(path, "its 'quantization_config' is no JSON object")
    return found


def quantization_label(config: Mapping[str, Any]) -> str:
    """What a `quantization_config` is, in short: `gptq 4 bits`, `compressed-tensors pack-quantized`."""
    how = f"{config['bits']} bits" if "bits" in config else config.get("format", "")
    return f"{config.get('quant_method')} {how}".rstrip()


@contextmanager
def open_safetensors(directory: Path, config: Mapping[str, Any]) -> Iterator[QuantizedTensors]:
    """The tensors of a checkpoint with that `quantization_config`.

    Raises:
        UnsupportedModel: it is damaged, or quantized by other means than those above.
    """
    method = config.get("quant_method")
    if method not in _FORMATS:
        raise UnsupportedModel(
            f"The checkpoint is quantized ({method}), which is not read; expected one of {', '.join(_FORMATS)}. "
            "Use the unquantized one or a .gguf file."
        )
    with ExitStack() as stack:
        with refusing(f"{directory} cannot be read as {method}"):
            tensors = _tensors(directory, _FORMATS[method](config), open_weights(weight_files(directory), stack))
        yield tensors


def _tensors(directory: Path, form: IntegerFormat, files: Mapping[str, Any]) -> QuantizedTensors:
    names = [name.removesuffix(f".{form.MARKER}") for name in files if name.endswith(f".{form.MARKER}")]
    modules = {f"{name}.weight": Module(directory, name, files) for name in names}
    matrices = {}
    for name, module in modules.items():
        facts = form.facts(module)
        matrices[name] = matrix_kind(module, facts), (facts.rows, facts.columns)
    parts = {f"{name}.{part}" for name in names for part in form.PARTS}
    floats = {name: _float_shape(directory, files[name], name) for name in files if name not in parts}

    def read(name: str) -> Groups | NDArray[np.float32]:
        with refusing(f"{directory}: {name} cannot be read"):
            return read_groups(form, modules[name]) if name in modules else read_floats(files, name)

    return QuantizedTensors(matrices, floats, read)


def _float_shape(directory: Path, file: Any, name: str) -> tuple[int, ...]:
    part = file.get_slice(name)
    if part.get_dtype() not in SCALE_DTYPES:
        raise UnsupportedModel(
            f"{directory}: {name} is stored as {part.get_dtype()}, and nothing says what it means; expected one of "
            f"{', '.join(SCALE_DTYPES)}."
        )
    return tuple(part.get_shape())
