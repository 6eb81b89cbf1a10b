"""A module bound to an arena: its parameters are views, its attention is paged, its forward takes packed batches.

Knows nothing of checkpoints, nor of when the memory under the views comes and goes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import msgspec
import torch
from torch import nn

from shuteye.errors import ImageFailure
from shuteye.memory.arena import Arena, torch_dtype
from shuteye.memory.image import WeightImage
from shuteye.models import attention
from shuteye.models.attention import AttentionBatch, AttentionContext, PagedCache, attending
from shuteye.models.blueprint import build_module, quiet
from shuteye.models.capabilities import check
from shuteye.models.fused import FusedDecoder, fuse
from shuteye.models.probe import AttentionFacts

TOKENIZER_DIR = "tokenizer"
CONFIG_DIR = "config"


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What an image's metadata says of its model.

    Attributes:
        context_length: positions the checkpoint was made for.
        default_sampling: what the checkpoint's generation config recommends.
        transformers: the version whose code was examined for `attention`.
    """

    architecture: str
    task: str
    vocab_size: int
    context_length: int
    eos_token_ids: tuple[int, ...]
    default_sampling: dict[str, float]
    attention: AttentionFacts
    dtype: str
    transformers: str


class ModelBatch(AttentionBatch, Protocol):
    """What a forward pass must know of a packed step; `runner.batch.PackedBatch` is one."""

    @property
    def input_ids(self) -> torch.Tensor:
        """[num_tokens]"""
        ...

    @property
    def positions(self) -> torch.Tensor:
        """[num_tokens]"""
        ...

    @property
    def logits_indices(self) -> torch.Tensor:
        """[num_sampled]"""
        ...


class LoadedModel:
    """A model whose parameters look into an arena; they are valid while that memory is resident.

    `fused` is the same model as a flat loop, where it is recognised: about half the time of the modules per step.
    """

    def __init__(
        self, module: Any, facts: ImageFacts, slot_names: dict[str, str], *, fused: FusedDecoder | None = None
    ) -> None:
        self.module = module
        self.facts = facts
        self.fused = fused
        self._slot_names = slot_names

    @property
    def architecture(self) -> str:
        """The class that the checkpoint names, such as `LlamaForCausalLM`."""
        return self.facts.architecture

    @property
    def task(self) -> str:
        """What the model is for; so far always "generate"."""
        return self.facts.task

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and of the KV cache."""
        return torch_dtype(self.facts.dtype)

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self.facts.vocab_size

    @property
    def context_length(self) -> int:
        """Positions that the checkpoint was made for."""
        return self.facts.context_length

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer, by generation config and config."""
        return self.facts.eos_token_ids

    @property
    def default_sampling(self) -> dict[str, float]:
        """What the checkpoint's generation config recommends."""
        return dict(self.facts.default_sampling)

    @property
    def num_layers(self) -> int:
        """Layers with a KV cache."""
        return self.facts.attention.num_layers

    @property
    def num_kv_heads(self) -> int:
        """KV heads of every layer."""
        return self.facts.attention.num_kv_heads

    @property
    def head_dim(self) -> int:
        """Size of one key, and of one value."""
        return self.facts.attention.head_dim

    def slot_of(self, checkpoint_name: str) -> str | None:
        """The arena slot that a tensor of the checkpoint is written to, tied names included; None if there is none."""
        return self._slot_names.get(checkpoint_name)

    @torch.inference_mode()
    def forward(self, batch: ModelBatch, kv_cache: PagedCache) -> torch.Tensor:
        """Compute a packed step: its keys and values go to the cache.

        Returns:
            float32 logits [num_sampled, vocab_size] of the tokens in `batch.logits_indices`, in that order.
        """
        context = AttentionContext(batch, kv_cache, self.facts.attention.windows)
        if self.fused is not None:
            return self.fused.forward(batch.input_ids, batch.positions, batch.logits_indices, context).float()
        with attending(context):
            output = self.module(
                input_ids=batch.input_ids[None],
                position_ids=batch.positions[None],
                use_cache=False,
                logits_to_keep=batch.logits_indices,
            )
        logits: torch.Tensor = output.logits[0]
        return logits.float()


def bind(image: WeightImage, arena: Arena) -> LoadedModel:
    """Build the module of an image and let every parameter look into `arena`, which has the image's layout.

    Touches no weight: the arena need not be resident yet.

    Raises:
        ImageFailure: image and module disagree; the message names the tensors.
        UnsupportedModel: transformers is another version than the image was made with, and serves this model no more.
    """
    attention.register()
    config = _read_config(image)
    facts = _current_facts(image, config)
    with quiet():
        module = build_module(config, dtype=torch_dtype(facts.dtype), attention=attention.IMPLEMENTATION)
    slot_names = {name: name for name in image.layout.slots} | dict(image.aliases)
    _bind_parameters(module, image, arena, slot_names)
    _bind_buffers(module, image.read_buffers())
    _require_complete(module, image)
    return LoadedModel(module, facts, slot_names, fused=fuse(module, image.layout, arena))


def _read_config(image: WeightImage) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(image.path / CONFIG_DIR, trust_remote_code=False, local_files_only=True)


def _current_facts(image: WeightImage, config: Any) -> ImageFacts:
    """The image's facts; the model is examined anew if transformers has changed since the image was made."""
    from transformers import __version__

    facts = msgspec.convert(dict(image.metadata), ImageFacts)
    if facts.transformers == __version__:
        return facts
    return replace(facts, attention=check(config), transformers=__version__)


def _bind_parameters(module: Any, image: WeightImage, arena: Arena, slot_names: dict[str, str]) -> None:
    """Tied parameters become one and the same, as the image says, whatever the config does."""
    bound: dict[str, nn.Parameter] = {}
    for name, blank in list(module.named_parameters(remove_duplicate=False)):
        slot = image.layout.slots.get(slot_names.get(name, ""))
        if slot is None or slot.shape != tuple(blank.shape):
            raise ImageFailure(
                f"{image.path} has {'no tensor ' if slot is None else 'another shape of '}{name!r}, which "
                f"{type(module).__name__} needs as {tuple(blank.shape)}. Remove the image to have it made anew."
            )
        if slot.name not in bound:
            bound[slot.name] = nn.Parameter(arena.slot_view(slot), requires_grad=False)
        owner, leaf = _owner(module, name)
        owner.register_parameter(leaf, bound[slot.name])


def _bind_buffers(module: Any, buffers: dict[str, torch.Tensor]) -> None:
    for name, buffer in buffers.items():
        owner, leaf = _owner(module, name)
        owner.register_buffer(leaf, buffer, persistent=True)


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def _require_complete(module: nn.Module, image: WeightImage) -> None:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    assert not (blank := [name for name, tensor in tensors if tensor.is_meta]), f"still without memory: {blank}"
    unused = set(image.layout.slots) - {name for name, _ in module.named_parameters(remove_duplicate=False)}
    if unused:
        raise ImageFailure(
            f"{image.path} has tensors that {type(module).__name__} does not know: {', '.join(sorted(unused)[:5])}. "
            "Remove the image to have it made anew."
        )
