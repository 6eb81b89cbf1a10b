"""What sets another checkpoint's image apart from the one a model is bound to, beside the weights themselves.

Knows nothing of layouts, nor of how a reload is carried out. Facts, config, buffers and tokenizer are read once, when
a model is bound: an image that differs in one of them is another model, whose weights alone would make nonsense.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shuteye.errors import InvalidRequest
from shuteye.memory.image import WeightImage
from shuteye.models.binding import CONFIG_DIR, TOKENIZER_DIR, read_image_config

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
        elif ours[name].dtype != theirs[name].dtype or not ours[name].equal(theirs[name]):
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
