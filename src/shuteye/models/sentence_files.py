"""What sentence-transformers' files beside a checkpoint say: pooling, activations, and prompts. No torch.

`modules.json` and the config.json of each module that it names; config_sentence_transformers.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from shuteye.errors import UnsupportedModel

Pooling = Literal["mean", "cls", "lasttoken", "max"]
Activation = Literal["sigmoid", "softmax", "identity"]

MODULES_FILE = "modules.json"
_SERVED_MODULES = ("Transformer", "Pooling", "Normalize")
_LEGACY_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""The keys of 1_Pooling/config.json before sentence-transformers 6, each true or false."""


@dataclass(frozen=True, slots=True)
class SentenceFiles:
    """The modules after the model itself, and limits of its input; None is what the files do not say.

    Attributes:
        max_length: longest input in tokens.
        lowercase: texts are lowercased before they reach the tokenizer.
    """

    pooling: Pooling | None = None
    normalize: bool | None = None
    max_length: int | None = None
    lowercase: bool = False


def has_pooling(directory: Path) -> bool:
    """True if the checkpoint says how its states are pooled."""
    return any(_kind(module) == "Pooling" for module in _modules(directory))


def read_sentence_files(directory: Path) -> SentenceFiles:
    """What the files in a checkpoint's directory say; all None if there are none.

    Raises:
        UnsupportedModel: a module or a kind of pooling that is not served; the message names it.
    """
    modules = _modules(directory)
    for module in modules:
        if _kind(module) not in _SERVED_MODULES:
            raise UnsupportedModel(
                f"{directory} has a module {_kind(module)!r} after its model; served are {', '.join(_SERVED_MODULES)}."
            )
    poolings = [
        _pooling_of_files(directory / module["path"] / "config.json")
        for module in modules
        if _kind(module) == "Pooling"
    ]
    transformer = _transformer_settings(directory)
    return SentenceFiles(
        pooling=poolings[0] if poolings else None,
        normalize=any(_kind(module) == "Normalize" for module in modules) if modules else None,
        max_length=transformer.get("max_seq_length"),
        lowercase=bool(transformer.get("do_lower_case")),
    )


def read_activation(directory: Path, config: Any) -> Activation:
    """What logits go through: what the files name, else what the head was trained with.

    A cross-encoder's default is a sigmoid (CrossEncoder's), a classifier's a softmax, or a sigmoid if a text may have
    several labels (transformers' `problem_type`).

    Raises:
        UnsupportedModel: something else, or the softmax of a single number.
    """
    said = getattr(config, "sentence_transformers", None) or {}
    name = (
        _read(directory / "config_sentence_transformers.json").get("activation_fn")
        or said.get("activation_fn")
        or getattr(config, "sbert_ce_default_activation_function", None)
    )
    if name is None:
        return _trained_with(config)
    activations: Mapping[str, Activation] = {"Sigmoid": "sigmoid", "Identity": "identity", "Softmax": "softmax"}
    found = activations.get(str(name).rpartition(".")[2])
    if found is None or (found == "softmax" and config.num_labels == 1):
        raise UnsupportedModel(f"{directory} puts its scores through {name!r}; served are {', '.join(activations)}.")
    return found


def _trained_with(config: Any) -> Activation:
    by_problem: Mapping[str, Activation] = {
        "regression": "identity",
        "single_label_classification": "softmax",
        "multi_label_classification": "sigmoid",
    }
    if config.num_labels == 1:
        return "sigmoid"
    return by_problem.get(getattr(config, "problem_type", None) or "", "softmax")


def read_prompts(directory: Path, config: Any) -> dict[str, str]:
    """What is put before a text, by what the embedding is for: sentence-transformers' `prompts`.

    As in vLLM, `task_instructions` of the model's config are taken in their place if there are any.
    """
    found = getattr(config, "task_instructions", None)
    if not isinstance(found, dict) or not found:
        found = _read(directory / "config_sentence_transformers.json").get("prompts")
    texts = found.items() if isinstance(found, dict) else ()
    return {str(name): text for name, text in texts if isinstance(text, str)}


def _modules(directory: Path) -> list[dict[str, Any]]:
    path = directory / MODULES_FILE
    found: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
    return found


def _kind(module: Mapping[str, Any]) -> str:
    return str(module["type"]).rpartition(".")[2]


def _pooling_of_files(path: Path) -> Pooling:
    settings = _read(path)
    modes = settings.get("pooling_mode") or [mode for key, mode in _LEGACY_POOLING.items() if settings.get(key)]
    modes = [modes] if isinstance(modes, str) else list(modes) or ["mean"]
    if len(modes) != 1 or modes[0] not in get_args(Pooling):
        raise UnsupportedModel(
            f"{path} pools by {' and '.join(map(repr, modes))}; served is one of {', '.join(get_args(Pooling))}."
        )
    found: Pooling = modes[0]
    return found


def _transformer_settings(directory: Path) -> dict[str, Any]:
    """sentence_bert_config.json, or what it is called for another model type."""
    return _read(min(directory.glob("sentence_*_config.json"), default=directory / "sentence_bert_config.json"))


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found
