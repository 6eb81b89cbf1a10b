"""Checkpoint → weight image: converted once, in layer order, with the tokenizer and the facts beside it.

After this the checkpoint is not read again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from shuteye.config import DType
from shuteye.errors import UnsupportedModel
from shuteye.memory.arena import dtype_name
from shuteye.memory.image import ImageIdentity, WeightImage
from shuteye.memory.image_store import ImageStore
from shuteye.memory.image_writer import ImageWriter
from shuteye.memory.layout import TensorSpec
from shuteye.models.binding import CONFIG_DIR, TOKENIZER_DIR, Origin
from shuteye.models.decoder import ImageSpec, LoadedModel, bind
from shuteye.models.encoder import EncoderSpec, examine_encoder, has_pooling
from shuteye.models.formats.checkpoint import (
    CheckpointTensors,
    open_checkpoint,
    read_config,
    read_generation_config,
    resolve_dtype,
    save_tokenizer,
    stored_as,
)
from shuteye.models.formats.files import refusing
from shuteye.models.fused import INVERSE_FREQUENCIES, FusedSpec, group_of, layout_order, recognise
from shuteye.models.modules import build_module, quiet, task_of
from shuteye.models.progress import Advanced, Finished, Progress, Started, no_progress
from shuteye.models.sources import ModelSource
from shuteye.models.support import AttentionSpec, check

if TYPE_CHECKING:
    from shuteye.models.whisper import WhisperImageSpec

__all__ = ["LoadedModel", "bind", "identity_of", "open_image"]

RECIPE = 3
"""Part of every image's identity: to be raised when the same checkpoint is to give another image."""

_SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_UNKNOWN_CONTEXT = 2048


@dataclass(frozen=True, slots=True)
class _Conversion:
    """One checkpoint on its way into one image; `streaming=False` always goes through transformers."""

    source: ModelSource
    dtype: torch.dtype
    progress: Progress
    streaming: bool = True

    def write(self, writer: ImageWriter) -> None:
        """Build the image; what cannot be served is refused before anything large is read, and by name."""
        name = self.source.name
        try:
            with refusing(f"{name} cannot be converted"):
                self._write(writer)
        except UnsupportedModel as error:
            if name in error.message:
                raise
            raise UnsupportedModel(f"{name}: {error.message}") from error

    def _write(self, writer: ImageWriter) -> None:
        self.progress(Started(f"Reading the configuration and tokenizer of {self.source.name}"))
        stored = stored_as(self.source)
        config = read_config(self.source)
        task = task_of(config, sentence_transformers=has_pooling(self.source.path))
        facts, buffers = self._examine(config, task)
        save_tokenizer(self.source, writer.directory / TOKENIZER_DIR)
        _save_config(config, self.source, writer.directory / CONFIG_DIR)
        if task == "transcribe":
            from shuteye.models.whisper import save_extractor

            save_extractor(self.source, writer.directory / CONFIG_DIR)
        self.progress(Finished())
        self.progress(Started(f"Reading the weights of {self.source.name}"))
        with open_checkpoint(self.source, config, dtype=self.dtype, streaming=self.streaming, task=task) as tensors:
            self.progress(Finished())
            order = layout_order(list(tensors.parameters))
            metadata = msgspec.to_builtins(facts) | Origin(self.source.origin, stored).as_metadata()
            writer.begin(_specs(order, tensors), aliases=tensors.aliases, metadata=metadata)
            self.progress(Started(f"Writing the weight image of {self.source.name}", tensors.nbytes))
            self._write_tensors(writer, order, tensors)
            for name, buffer in buffers.items():
                writer.put_buffer(name, buffer)
            self.progress(Finished())

    def _examine(
        self, config: Any, task: str
    ) -> tuple[ImageSpec | EncoderSpec | WhisperImageSpec, dict[str, torch.Tensor]]:
        """What the image's metadata says of the model, and the buffers that are in no checkpoint but are needed."""
        if task == "transcribe":
            from shuteye.models.whisper import (
                examine_speech,  # whose import takes transformers along
            )

            return examine_speech(config, self.source, dtype=self.dtype), {}
        if task in {"embed", "score"}:
            return examine_encoder(config, self.source, task=task, dtype=self.dtype), {}
        attention = check(config)
        with quiet():
            blueprint = build_module(config, dtype=self.dtype, attention="eager")
        facts = _facts(config, read_generation_config(self.source), self.dtype, attention, recognise(blueprint))
        needed = [] if facts.fused is None else [INVERSE_FREQUENCIES]
        return facts, {name: blueprint.get_buffer(name) for name in needed}

    def _write_tensors(self, writer: ImageWriter, order: list[str], tensors: CheckpointTensors) -> None:
        for name in order:
            tensor = tensors.read(name)
            writer.put(name, tensor)
            self.progress(Advanced(tensor.nbytes))
        for name, buffer in tensors.buffers.items():
            writer.put_buffer(name, buffer)


def open_image(
    source: ModelSource, *, dtype: DType, store: ImageStore, progress: Progress | None = None
) -> WeightImage:
    """The weight image of a checkpoint, converted first if there is none.

    Args:
        dtype: what to serve in; "auto" is the checkpoint's, with float16 and packed formats as bfloat16.

    Raises:
        UnsupportedModel: it cannot be served correctly, or has no fast tokenizer.
        ImageFailure: the image cannot be written.
    """
    resolved = resolve_dtype(source, dtype)
    conversion = _Conversion(source, resolved, progress or no_progress)
    return store.open_or_build(identity_of(source, resolved), conversion.write)


def identity_of(source: ModelSource, dtype: torch.dtype) -> ImageIdentity:
    """What the image of `source` in `dtype` is filed under."""
    return ImageIdentity(source.name, f"{source.fingerprint}.{RECIPE}", dtype_name(dtype))


def _specs(order: Iterable[str], tensors: CheckpointTensors) -> list[TensorSpec]:
    specs = []
    for name in order:
        shape, dtype = tensors.parameters[name]
        specs.append(TensorSpec(name, shape, dtype_name(dtype), group=group_of(name)))
    return specs


def _facts(
    config: Any, generation: Mapping[str, Any], dtype: torch.dtype, attention: AttentionSpec, fused: FusedSpec | None
) -> ImageSpec:
    from transformers import __version__

    return ImageSpec(
        architecture=(config.architectures or [config.model_type])[0],
        task="generate",
        vocab_size=config.vocab_size,
        context_length=getattr(config, "max_position_embeddings", None) or _UNKNOWN_CONTEXT,
        eos_token_ids=_eos_token_ids(generation.get("eos_token_id"), config.eos_token_id),
        default_sampling={key: generation[key] for key in _SAMPLING_KEYS if generation.get(key) is not None},
        attention=attention,
        fused=fused,
        dtype=dtype_name(dtype),
        transformers=__version__,
    )


def _eos_token_ids(*named: int | list[int] | None) -> tuple[int, ...]:
    """Everything that any of the configs calls an end, each once."""
    found: dict[int, None] = {}
    for ids in named:
        found |= dict.fromkeys(ids if isinstance(ids, list) else [] if ids is None else [ids])
    return tuple(found)


def _save_config(config: Any, source: ModelSource, directory: Path) -> None:
    directory.mkdir()
    config.save_pretrained(directory)
    generation = read_generation_config(source)
    if generation:
        (directory / "generation_config.json").write_text(json.dumps(generation, indent=2))
