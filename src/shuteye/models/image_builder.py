"""Checkpoint → weight image: converted once, in layer order, with the tokenizer and the facts beside it.

After this the checkpoint is not read again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from shuteye.config import DType
from shuteye.errors import UnsupportedModel
from shuteye.matrices.kinds import ROWS, MatrixKind
from shuteye.matrices.stored import StoredMatrix
from shuteye.memory.image import WeightImage
from shuteye.memory.image_store import ImageStore
from shuteye.memory.image_writer import ImageWriter
from shuteye.memory.layout import TensorSpec
from shuteye.models.binding import CONFIG_DIR, TOKENIZER_DIR, Origin, Shard
from shuteye.models.decoder import LoadedModel, bind
from shuteye.models.encoder import EncoderSpec, examine_encoder
from shuteye.models.formats.checkpoint import (
    CheckpointTensors,
    open_checkpoint,
    read_config,
    read_generation_config,
    save_tokenizer,
    stored_as,
)
from shuteye.models.formats.dtypes import served_dtype
from shuteye.models.formats.files import refusing
from shuteye.models.fused import INVERSE_FREQUENCIES, FusedSpec, group_of, recognise
from shuteye.models.image_content import content_of
from shuteye.models.image_form import AS_STORED, ImageForm
from shuteye.models.image_identity import identity_of
from shuteye.models.image_spec import AttentionSpec, ImageSpec
from shuteye.models.module_split import divide
from shuteye.models.modules import build_module, quiet, task_of, tied_names
from shuteye.models.progress import Advanced, Finished, Progress, Started, no_progress
from shuteye.models.quantizable import Quantizable, quantizable
from shuteye.models.sentence_files import has_pooling
from shuteye.models.sources import ModelSource
from shuteye.models.support import check
from shuteye.models.tensors import as_bytes, dtype_name, torch_dtype
from shuteye.parallel.module_shards import ModulePlan, ModuleSplit
from shuteye.parallel.shards import (
    HEAD,
    ONE_RANK,
    ROW_MULTIPLE,
    DecoderShape,
    Part,
    RankPlace,
    ShardPlan,
    part_shape,
    plan_shards,
)

if TYPE_CHECKING:
    from shuteye.models.whisper import WhisperImageSpec

__all__ = ["LoadedModel", "bind", "identity_of", "open_image"]

_SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_UNKNOWN_CONTEXT = 2048


@dataclass(frozen=True, slots=True)
class _Model:
    """What was found out about a checkpoint before its weights are read.

    Attributes:
        buffers: that are in no checkpoint but are needed.
        quantizable: the parameters that may be held quantized.
        split: what it is split by; None: one rank has all of it.
    """

    facts: ImageSpec | EncoderSpec | WhisperImageSpec
    buffers: Mapping[str, torch.Tensor]
    quantizable: Quantizable
    split: DecoderShape | ModuleSplit | None = None

    @property
    def is_flat(self) -> bool:
        """Whether the flat loop computes it, which reads matrices of any kind."""
        return isinstance(self.facts, ImageSpec) and self.facts.fused is not None

    def split_of(
        self, tensors: CheckpointTensors, kinds: Mapping[str, MatrixKind]
    ) -> DecoderShape | ModuleSplit | None:
        """What it is split by, with its head tied as it is in the checkpoint, and its MLP cut where blocks end."""
        match self.split:
            case ModuleSplit() as split:
                return split.with_tie(split.head in tensors.aliases).with_blocks(
                    {name: kind.cut_columns for name, kind in kinds.items()}
                )
            case DecoderShape() as shape:
                blocks = (kind.cut_columns for name, kind in kinds.items() if name.endswith("mlp.down_proj.weight"))
                return replace(shape, tied=HEAD in tensors.aliases, mlp_multiple=max((ROW_MULTIPLE, *blocks)))
        return None

    def kinds_of(self, tensors: CheckpointTensors, form: ImageForm, dtype: str) -> dict[str, MatrixKind]:
        """The kind of each tensor, before it is split."""
        known = self.quantizable
        return {
            name: form.kind_of(
                shape, dtype, tensors.stored.get(name), careful=name in known.careful, packed=self.is_flat
            )
            if name in known.matrices
            else ROWS
            for name, (shape, _) in tensors.parameters.items()
        }


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

    def kind_of(self, name: str, kind: MatrixKind, part: Part) -> MatrixKind:
        """The kind of the part of a tensor.

        Raises:
            UnsupportedModel: it would be cut within blocks.
        """
        if self.plan is None or kind == ROWS:
            return kind
        if self.plan.shares_rows(name) and any(each.start % kind.panel_rows for each in self.plan.vocabularies):
            return ROWS  # so few tokens that some rank's begin within a panel
        columns = part[1]
        assert isinstance(columns, slice)
        if kind.is_quantized and any(edge % kind.cut_columns for edge in (columns.start, columns.stop)):
            raise UnsupportedModel(
                f"{name} is held as {kind.name}, in blocks of {kind.cut_columns} columns, and tensor_parallel_size "
                f"{self.plan.spec.tp_size} would give a rank columns {columns.start} to {columns.stop} of it. Use "
                "another size, pipeline_parallel_size, or --quantization none.",
                param="tensor_parallel_size",
            )
        return kind

    def begin(
        self,
        tensors: CheckpointTensors,
        kinds: Mapping[str, MatrixKind],
        model: _Model,
        origin: Origin,
        *,
        beside_bytes: int,
    ) -> int:
        """Fix the image's layout; the bytes of its weights."""
        specs: list[TensorSpec] = []
        for name, (shape, dtype) in tensors.parameters.items():
            part = self.part_of(name, shape)
            if part is not None:
                mine, kind = part_shape(part, shape), self.kind_of(name, kinds[name], part)
                specs.append(TensorSpec(name, mine, dtype_name(dtype), group=group_of(name), kind=kind.name))
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

    def put(self, name: str, tensor: torch.Tensor | StoredMatrix, kind: MatrixKind, dtype: torch.dtype) -> None:
        """Write what of a tensor goes here."""
        part = self.part_of(name, tuple(tensor.shape))
        if part is not None:
            self.writer.put(name, content_of(tensor, part, self.kind_of(name, kind, part), dtype))

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
    form: ImageForm = AS_STORED

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
        with open_checkpoint(
            self.source,
            config,
            dtype=self.dtype,
            streaming=self.streaming,
            task=task,
            is_flat=model.is_flat,
            keeps_bits=self.form.quantization != "none",
        ) as tensors:
            self.progress(Finished())
            self._write_weights(writers, tensors, model, Origin(self.source.origin, stored))

    def _examine(self, config: Any, task: str) -> _Model:
        """Ask the model's own code."""
        if task == "transcribe":
            from shuteye.models.whisper import (
                examine_speech,  # whose import takes transformers along
            )

            self._refuse_ranks("Whisper models are")
            return _Model(examine_speech(config, self.source, dtype=self.dtype), {}, self._quantizable(config, task))
        if task in {"embed", "score", "classify"}:
            self._refuse_ranks("Models that embed, score or classify are")
            spec = examine_encoder(config, self.source, task=task, dtype=self.dtype)
            return _Model(spec, {}, self._quantizable(config, task))
        attention = check(config)
        with quiet():
            blueprint = build_module(config, dtype=self.dtype, attention="eager")
        facts = _facts(config, read_generation_config(self.source), self.dtype, attention, recognise(blueprint))
        matrices = quantizable(blueprint)
        if facts.fused is None:
            split = divide(config, attention, self.place) if self.place.num_ranks > 1 else None
            return _Model(facts, {}, matrices, split)
        buffers = {INVERSE_FREQUENCIES: blueprint.get_buffer(INVERSE_FREQUENCIES)}
        if self.place.num_ranks == 1:
            return _Model(facts, buffers, matrices)
        shape = _shape(config, facts.fused, tied=HEAD in tied_names(blueprint))
        plan_shards(shape, self.place)  # refuses what cannot be split
        return _Model(facts, buffers, matrices, shape)

    def _quantizable(self, config: Any, task: str) -> Quantizable:
        with quiet():
            return quantizable(build_module(config, dtype=self.dtype, attention="eager", task=task))

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
        if self.form.quantizes and tensors.stored:
            raise UnsupportedModel(
                f"quantization is {self.form.quantization!r}, and the checkpoint is quantized already "
                f"({origin.source_format}); leave it out, or use the checkpoint that is not.",
                param="quantization",
            )
        kinds = model.kinds_of(tensors, self.form, dtype_name(self.dtype))
        split = model.split_of(tensors, kinds)
        targets = [_Target.of(writer, self.place.all(), split) for writer in writers]
        nbytes = 0
        for target in targets:
            nbytes += target.begin(tensors, kinds, model, origin, beside_bytes=nbytes)
        self.progress(Started(f"Writing the weight image of {self.source.name}", tensors.nbytes))
        for name, (shape, dtype) in tensors.parameters.items():
            tensor = tensors.read(name)
            for target in targets:
                target.put(name, tensor, kinds[name], dtype)
            self.progress(Advanced(prod(shape) * dtype.itemsize))
        buffers = {**tensors.buffers, **model.buffers}
        if tensors.rope_factors is not None:
            buffers[INVERSE_FREQUENCIES] = buffers[INVERSE_FREQUENCIES] / torch.from_numpy(tensors.rope_factors)
        for target in targets:
            target.put_buffers(buffers)
        self.progress(Finished())


def open_image(
    source: ModelSource,
    *,
    dtype: DType,
    store: ImageStore,
    progress: Progress | None = None,
    place: RankPlace = ONE_RANK,
    form: ImageForm = AS_STORED,
) -> WeightImage:
    """The weight image of a checkpoint, or of a rank's part of it; converted first, for all ranks at once, if there is
    none.

    Args:
        dtype: what to serve in; "auto" is the checkpoint's, with float16 and packed formats as bfloat16.
        place: whose part.
        form: how matrices lie, and in what bits.

    Raises:
        UnsupportedModel: it cannot be served correctly, or not by so many ranks, or has no fast tokenizer.
        ImageFailure: an image cannot be written.
    """
    served = served_dtype(source, dtype)
    conversion = _Conversion(source, torch_dtype(served), progress or no_progress, place=place, form=form)
    everyones = [identity_of(source, served, each, form) for each in place.all()]
    return store.open_or_build_one_of(everyones[place.rank], everyones, lambda writers: conversion.write(*writers))


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
