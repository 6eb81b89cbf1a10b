"""What an image says of a model that transcribes: how it is led through a recording, and how sound becomes features.

Knows nothing of weights, nor of how the model runs (`speech.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shuteye.errors import UnsupportedModel
from shuteye.model_info import WhisperSpec
from shuteye.models.formats.checkpoint import read_generation_config
from shuteye.models.sources import ModelSource

TASK = "transcribe"
SAMPLE_RATE = 16_000
CONVOLUTION_STRIDE = 2
"""Frames per position of the encoder, and so per timestamp token."""

_EXTRACTOR_FILE = "preprocessor_config.json"


@dataclass(frozen=True, slots=True)
class WhisperImageSpec:
    """What an image's metadata says of a model that transcribes; fields as in `loaded.ImageSpec`."""

    architecture: str
    task: str
    vocab_size: int
    context_length: int
    eos_token_ids: tuple[int, ...]
    speech: WhisperSpec
    dtype: str
    transformers: str


def examine_speech(config: Any, source: ModelSource, *, dtype: torch.dtype) -> WhisperImageSpec:
    """What the image of a Whisper checkpoint is to say.

    Raises:
        UnsupportedModel: another architecture, or a checkpoint that does not say how it is to be led.
    """
    from transformers import __version__

    if config.model_type != "whisper":
        raise UnsupportedModel(f"Model type {config.model_type!r} transcribes, but only Whisper models are served.")
    generation = read_generation_config(source)
    wanted = ("no_timestamps_token_id", "eos_token_id", "decoder_start_token_id")
    missing = [name for name in wanted if not isinstance(generation.get(name), int)]
    if missing:
        raise UnsupportedModel(
            f"{source.name}: generation_config.json lacks {', '.join(missing)}, without which nobody can say what the "
            "model writes. Take that file from the original model on the hub."
        )
    return WhisperImageSpec(
        architecture=config.architectures[0],
        task=TASK,
        vocab_size=config.vocab_size,
        context_length=config.max_target_positions,
        eos_token_ids=(generation["eos_token_id"],),
        speech=_facts(config, generation, source, dtype),
        dtype=str(dtype).removeprefix("torch."),
        transformers=__version__,
    )


def _facts(config: Any, generation: Mapping[str, Any], source: ModelSource, dtype: torch.dtype) -> WhisperSpec:
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    by_spelling = (generation.get("lang_to_id") or {}) if generation.get("is_multilingual", True) else {}
    languages = {spelling.strip("<|>"): token_id for spelling, token_id in by_spelling.items()}
    cached = config.decoder_layers * 2 * config.d_model * (config.max_source_positions + config.max_target_positions)
    return WhisperSpec(
        hop_samples=_extractor(config, source).hop_length,
        window_frames=CONVOLUTION_STRIDE * config.max_source_positions,
        frames_per_timestamp=CONVOLUTION_STRIDE,
        start_token_id=generation["decoder_start_token_id"],
        eos_token_id=generation["eos_token_id"],
        no_timestamps_token_id=generation["no_timestamps_token_id"],
        previous_token_id=generation.get("prev_sot_token_id"),
        transcribe_token_id=(generation.get("task_to_id") or {}).get("transcribe"),
        languages=languages,
        language_names={name: code for name, code in TO_LANGUAGE_CODE.items() if code in (languages or ("en",))},
        max_tokens=config.max_target_positions,
        state_bytes=cached * dtype.itemsize,
    )


def _extractor(config: Any, source: ModelSource) -> Any:
    """The checkpoint's feature extractor, held against its model.

    Raises:
        UnsupportedModel: it makes other features than the model takes.
    """
    from transformers import WhisperFeatureExtractor

    if not (source.path / _EXTRACTOR_FILE).is_file():
        raise UnsupportedModel(f"{source.name} has no {_EXTRACTOR_FILE}, which says how sound becomes features.")
    extractor = WhisperFeatureExtractor.from_pretrained(source.path, local_files_only=True)
    made = (extractor.feature_size, extractor.nb_max_frames, extractor.sampling_rate)
    taken = (config.num_mel_bins, CONVOLUTION_STRIDE * config.max_source_positions, SAMPLE_RATE)
    if made != taken:
        raise UnsupportedModel(
            f"{source.name}: {_EXTRACTOR_FILE} makes {made}, the model takes {taken} (bins, frames, samples/s)."
        )
    return extractor


def save_extractor(source: ModelSource, directory: Path) -> None:
    """Put what `WhisperFeatureExtractor.from_pretrained` reads into a directory."""
    (directory / _EXTRACTOR_FILE).write_bytes((source.path / _EXTRACTOR_FILE).read_bytes())
