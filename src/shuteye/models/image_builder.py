"""Checkpoint → weight image: converted once, in layer order, with the tokenizer and the facts beside it.

After this the checkpoint is not read again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from shuteye.config import DType
from shuteye.errors import UnsupportedModel
from shuteye.memory.image import ImageIdentity, WeightImage
from shuteye.memory.image_store import ImageStore
from shuteye.memory.image_writer import ImageWriter
from shuteye.memory.layout import TensorSpec
from shuteye.models.binding import CONFIG_DIR, TOKENIZER_DIR, Origin, Shard
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
from shuteye.models.fused import INVERSE_FREQUENCIES, FusedSpec, are_joined, group_of, layout_order, recognise
from shuteye.models.module_split import divide
from shuteye.models.modules import build_module, quiet, task_of, tied_names
from shuteye.models.progress import Advanced, Finished, Progress, Started, no_progress
from shuteye.models.sources import ModelSource
from shuteye.models.support import AttentionSpec, check
from shuteye.models.tensors import as_bytes, dtype_name
from shuteye.parallel.module_shards import ModulePlan, ModuleSplit
from shuteye.parallel.shards import HEAD, ONE_RANK, DecoderShape, Part, RankPlace, ShardPlan, part_shape, plan_shards

if TYPE_CHECKING:
    from shuteye.models.whisper import WhisperImageSpec

__all__ = ["LoadedModel", "bind", "identity_of", "open_image"]

RECIPE = 3
"""Part of every image's identity: to be raised when the same checkpoint is to give another image, or other shards."""

_SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_UNKNOWN_CONTEXT = 2048


@dataclass(frozen=True, slots=True)
class _Model:
    """What was found out about a checkpoint before its weights are read.

    Attributes:
        buffers: that are in no checkpoint but are needed.
        split: what it is split by; None: one rank has all of it.
    """

    facts: ImageSpec | EncoderSpec | WhisperImageSpec
    buffers: Mapping[str, torch.Tensor]
    split: DecoderShape | ModuleSplit | None = None

    def split_of(self, tensors: CheckpointTensors) -> DecoderShape | ModuleSplit | None:
        """What it is split by, with its head tied as it is in the checkpoint."""
        match self.split:
            case ModuleSplit() as split:
                return split.with_tie(split.head in tensors.aliases)
            case DecoderShape() as shape:
                return replace(shape, tied=HEAD in tensors.aliases)
        return None


@dataclass(frozen=True, slots=True)
class _Target:
    """One image on its way, and the part of the model that goes into it.

    Attributes:
        shard: None: everything.
    """

    writer: ImageWriter
    shard: Shard | None
    plan: ShardPlan | ModulePlan | None

    @classmethod
    def of(cls, writer: ImageWriter, places: Iterable[RankPlace], split: DecoderShape | ModuleSplit | None) -> _Target:
        """The part that the writer's identity names."""
        if split is None:
            return cls(writer, None, None)
        (place,) = (place for place in places if place.label == writer.identity.shard)
        shard = Shard.at(place, split)
        return cls(writer, shard, shard.plan)

    def part_of(self, name: str, shape: tuple[int, ...]) -> Part | None:
        """What of a tensor goes here; None if nothing does."""
        return tuple(map(slice, shape)) if self.plan is None else self.plan.part_of(name, shape)

    def begin(
        self, order: list[str], tensors: CheckpointTensors, model: _Model, origin: Origin, *, beside_bytes: int
    ) -> int:
        """Fix the image's layout; the bytes of its weights."""
        specs: list[TensorSpec] = []
        for name in order:
            shape, dtype = tensors.parameters[name]
            part = self.part_of(name, shape)
            if part is not None:
                # Parts may be smaller than a cache line; whole tensors lie where they always lay.
                joined = isinstance(self.plan, ShardPlan) and bool(specs) and are_joined(specs[-1].name, name)
                mine = part_shape(part, shape)
                specs.append(TensorSpec(name, mine, dtype_name(dtype), group=group_of(name), joined=joined))
        names = {spec.name for spec in specs}
        facts = model.facts
        if self.plan is not None:
            assert isinstance(facts, ImageSpec)
            facts = _facts_of_rank(facts, self.plan)
        shard = {} if self.shard is None else self.shard.as_metadata()
        layout = self.writer.begin(
            specs,
            aliases={alias: name for alias, name in tensors.aliases.items() if name in names},
            metadata=msgspec.to_builtins(facts) | origin.as_metadata() | shard,
            beside_bytes=beside_bytes,
        )
        return layout.nbytes

    def put_buffers(self, buffers: Mapping[str, torch.Tensor]) -> None:
        """Write those that are not of layers of other stages."""
        for name, buffer in buffers.items():
            if not isinstance(self.plan, ModulePlan) or self.plan.has_module(name):
                self.writer.put_buffer(name, as_bytes(buffer))


@dataclass(frozen=True, slots=True)
class _Conversion:
    """One checkpoint on its way into one image, or into one for each rank.

    Attributes:
        streaming: False: always through transformers.
        place: one of the ranks that the model is for.
    """

    source: ModelSource
    dtype: torch.dtype
    progress: Progress
    streaming: bool = True
    place: RankPlace = ONE_RANK

    def write(self, *writers: ImageWriter) -> None:
        """Build the images; what cannot be served is refused before anything large is read, and by name."""
        name = self.source.name
        try:
            with refusing(f"{name} cannot be converted"):
                self._write(writers)
        except UnsupportedModel as error:
            if name in error.message:
                raise
            raise UnsupportedModel(f"{name}: {error.message}", param=error.param) from error

    def _write(self, writers: Sequence[ImageWriter]) -> None:
        self.progress(Started(f"Reading the configuration and tokenizer of {self.source.name}"))
        stored = stored_as(self.source)
        config = read_config(self.source)
        task = task_of(config, sentence_transformers=has_pooling(self.source.path))
        model = self._examine(config, task)
        self._write_files(writers, config, task)
        self.progress(Finished())
        self.progress(Started(f"Reading the weights of {self.source.name}"))
        with open_checkpoint(self.source, config, dtype=self.dtype, streaming=self.streaming, task=task) as tensors:
            self.progress(Finished())
            self._write_weights(writers, tensors, model, Origin(self.source.origin, stored))

    def _examine(self, config: Any, task: str) -> _Model:
        """Ask the model's own code."""
        if task == "transcribe":
            from shuteye.models.whisper import (
                examine_speech,  # whose import takes transformers along
            )

            self._refuse_ranks("Whisper models are")
            return _Model(examine_speech(config, self.source, dtype=self.dtype), {})
        if task in {"embed", "score"}:
            self._refuse_ranks("Models that embed or score are")
            return _Model(examine_encoder(config, self.source, task=task, dtype=self.dtype), {})
        attention = check(config)
        with quiet():
            blueprint = build_module(config, dtype=self.dtype, attention="eager")
        facts = _facts(config, read_generation_config(self.source), self.dtype, attention, recognise(blueprint))
        if facts.fused is None:
            return _Model(facts, {}, divide(config, attention, self.place) if self.place.num_ranks > 1 else None)
        buffers = {INVERSE_FREQUENCIES: blueprint.get_buffer(INVERSE_FREQUENCIES)}
        if self.place.num_ranks == 1:
            return _Model(facts, buffers)
        shape = _shape(config, facts.fused, tied=HEAD in tied_names(blueprint))
        plan_shards(shape, self.place)  # refuses what cannot be split
        return _Model(facts, buffers, shape)

    def _refuse_ranks(self, which: str) -> None:
        if self.place.num_ranks == 1:
            return
        param = "tensor_parallel_size" if self.place.tp_size > 1 else "pipeline_parallel_size"
        raise UnsupportedModel(f"{which} served by one rank only; leave out {param}.", param=param)

    def _write_files(self, writers: Sequence[ImageWriter], config: Any, task: str) -> None:
        """Everything beside the weights: the same in all images."""
        first = writers[0].directory
        save_tokenizer(self.source, first / TOKENIZER_DIR)
        _save_config(config, self.source, first / CONFIG_DIR)
        if task == "transcribe":
            from shuteye.models.whisper import save_extractor

            save_extractor(self.source, first / CONFIG_DIR)
        for writer in writers[1:]:
            for name in (TOKENIZER_DIR, CONFIG_DIR):
                shutil.copytree(first / name, writer.directory / name)

    def _write_weights(
        self, writers: Sequence[ImageWriter], tensors: CheckpointTensors, model: _Model, origin: Origin
    ) -> None:
        """Read each tensor once, and write to each image its part of it."""
        split = model.split_of(tensors)
        targets = [_Target.of(writer, self.place.all(), split) for writer in writers]
        order = layout_order(list(tensors.parameters))
        nbytes = 0
        for target in targets:
            nbytes += target.begin(order, tensors, model, origin, beside_bytes=nbytes)
        self.progress(Started(f"Writing the weight image of {self.source.name}", tensors.nbytes))
        for name in order:
            tensor = tensors.read(name)
            for target in targets:
                part = target.part_of(name, tuple(tensor.shape))
                if part is not None:
                    target.writer.put(name, as_bytes(tensor[part]))
            self.progress(Advanced(tensor.nbytes))
        for target in targets:
            target.put_buffers({**tensors.buffers, **model.buffers})
        self.progress(Finished())


def open_image(
    source: ModelSource,
    *,
    dtype: DType,
    store: ImageStore,
    progress: Progress | None = None,
    place: RankPlace = ONE_RANK,
) -> WeightImage:
    """The weight image of a checkpoint, or of a rank's part of it; converted first, for all ranks at once, if there is
    none.

    Args:
        dtype: what to serve in; "auto" is the checkpoint's, with float16 and packed formats as bfloat16.
        place: whose part.

    Raises:
        UnsupportedModel: it cannot be served correctly, or not by so many ranks, or has no fast tokenizer.
        ImageFailure: an image cannot be written.
    """
    resolved = resolve_dtype(source, dtype)
    conversion = _Conversion(source, resolved, progress or no_progress, place=place)
    everyones = [identity_of(source, resolved, each) for each in place.all()]
    return store.open_or_build_one_of(everyones[place.rank], everyones, lambda writers: conversion.write(*writers))


def identity_of(source: ModelSource, dtype: torch.dtype, place: RankPlace = ONE_RANK) -> ImageIdentity:
    """What the image of `source` in `dtype`, or of a rank's part of it, is filed under."""
    return ImageIdentity(source.name, f"{source.fingerprint}.{RECIPE}", dtype_name(dtype), place.label)


def _shape(config: Any, fused: FusedSpec, *, tied: bool) -> DecoderShape:
    return DecoderShape(
        num_layers=fused.num_layers,
        num_heads=fused.num_heads,
        num_kv_heads=fused.num_kv_heads,
        head_dim=fused.head_dim,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        tied=tied,
    )


def _facts_of_rank(facts: ImageSpec, plan: ShardPlan | ModulePlan) -> ImageSpec:
    """The facts of a model that has the rank's layers and heads alone."""
    layers, num_kv_heads = plan.spec.layers, len(plan.spec.kv_groups)
    windows = facts.attention.windows[layers.start : layers.stop]
    attention = replace(facts.attention, num_layers=len(layers), num_kv_heads=num_kv_heads, windows=windows)
    if isinstance(plan, ModulePlan):
        return replace(facts, attention=attention)
    assert facts.fused is not None
    fused = replace(facts.fused, num_layers=len(layers), num_heads=plan.num_heads, num_kv_heads=num_kv_heads)
    return replace(facts, attention=attention, fused=fused)


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
