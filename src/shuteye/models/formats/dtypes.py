"""The dtype that a checkpoint is served in, by its config or by what it stores. No torch."""

from __future__ import annotations

from contextlib import ExitStack

from shuteye.config import DType
from shuteye.errors import UnsupportedModel
from shuteye.models.formats.files import open_weights, read_json, stored_formats, weight_files
from shuteye.models.sources import ModelSource

_WIDE = frozenset({"float32", "float64"})
_NARROW = frozenset({"bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"})


def served_dtype(source: ModelSource, wanted: DType) -> str:
    """The dtype to serve in; "auto" is the checkpoint's, with packed formats and float16 (slow on CPUs) as bfloat16."""
    if wanted != "auto":
        return "bfloat16" if wanted == "float16" else wanted
    if source.kind == "gguf":
        return "bfloat16"
    path = source.path / "config.json"
    config = read_json(path)
    named = config.get("dtype") or config.get("torch_dtype")
    named = named.removeprefix("torch.") if isinstance(named, str) else "auto"
    if named not in _NARROW | _WIDE | {"auto"}:
        raise UnsupportedModel(
            f"{path} names the dtype {named!r}, which is not served; expected {', '.join(sorted(_NARROW | _WIDE))}."
        )
    return "float32" if (_stored_dtype(source) if named == "auto" else named) in _WIDE else "bfloat16"


def _stored_dtype(source: ModelSource) -> str:
    """The dtype that most numbers are stored in."""
    with ExitStack() as stack:
        counts = stored_formats(open_weights(weight_files(source.path), stack, framework="numpy"))
    return counts.most_common(1)[0][0] if counts else "bfloat16"
