"""A model bound to an arena: its tensors are views, its attention is paged, its forward takes packed batches."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec
import numpy as np
import torch

from shuteye.errors import ImageFailure
from shuteye.memory.arena import Arena
from shuteye.memory.image import WeightImage
from shuteye.memory.layout import Slot
from shuteye.models import attention
from shuteye.models.attention import AttentionContext, attending
from shuteye.models.binding import BoundModel, CommonSpec, Shard, read_image_config, slot_names_of
from shuteye.models.fused import INVERSE_FREQUENCIES, FusedDecoder, FusedSpec, wide_weights
from shuteye.models.module_binding import bind_module
from shuteye.models.module_split import divide
from shuteye.models.modules import build_module, quiet
from shuteye.models.rank_decoder import RankDecoder, RankGroups, rank_weights
from shuteye.models.rank_module import RankModule, RankModuleDecoder
from shuteye.models.support import AttentionSpec, check
from shuteye.models.tensors import arena_view, buffers_of, torch_dtype
from shuteye.parallel.module_shards import ModulePlan
from shuteye.parallel.shards import RankPlace, ShardPlan

if TYPE_CHECKING:
    from shuteye.cache.kv_cache import KVCache
    from shuteye.tasks.generate.runner import PackedBatch

logger = logging.getLogger(__name__)

Array: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, slots=True)
class ImageSpec(CommonSpec):
    """What an image's metadata says of a model that generates.

    Attributes:
        eos_token_ids: the tokens that end an answer, by generation config and config.
        default_sampling: what the checkpoint's generation config recommends.
        fused: what the flat loop must know, if it can stand in for the modules.
    """

    eos_token_ids: tuple[int, ...]
    default_sampling: dict[str, float]
    attention: AttentionSpec
    fused: FusedSpec | None


class ModuleDecoder:
    """A transformers module whose parameters are views of an arena and whose attention is paged.

    Attributes:
        native_tokens: the largest step that native kernels compute: none.
    """

    native_tokens = 0

    def __init__(self, module: Any, windows: Sequence[int | None]) -> None:
        self.module = module
        self._windows = windows

    def forward(self, batch: PackedBatch, kv_cache: KVCache) -> torch.Tensor:
        """Logits [num_sampled, vocab_size] of the tokens in `batch.logits_indices`, in that order."""
        with attending(AttentionContext(batch, kv_cache, self._windows)):
            output = self.module(
                input_ids=torch.from_numpy(batch.input_ids)[None],
                position_ids=torch.from_numpy(batch.positions)[None],
                use_cache=False,
                logits_to_keep=torch.from_numpy(batch.logits_indices),
            )
        logits: torch.Tensor = output.logits[0]
        return logits


class LoadedModel(BoundModel[ImageSpec]):
    """A model that generates.

    Attributes:
        decoder: what computes its steps: a flat loop, or transformers' own modules.
    """

    def __init__(
        self,
        facts: ImageSpec,
        decoder: FusedDecoder | ModuleDecoder | RankDecoder | RankModuleDecoder,
        slot_names: dict[str, str],
        shard: ShardPlan | ModulePlan | None = None,
    ) -> None:
        super().__init__(facts, slot_names)
        self.shard = shard
        self.eos_token_ids = facts.eos_token_ids
        self.default_sampling = facts.default_sampling
        self.decoder = decoder

    @torch.inference_mode()
    def forward(self, batch: PackedBatch, kv_cache: KVCache) -> Array:
        """Compute a packed step: its keys and values go to the cache.

        Returns:
            float32 logits [num_sampled, vocab_size] of the tokens in `batch.logits_indices`, in that order. On a rank
            that does not hold the sampler, what it computed instead: see `RankDecoder.forward`.
        """
        return self.decoder.forward(batch, kv_cache).float().numpy()


def bind(
    image: WeightImage,
    arena: Arena,
    *,
    modules: bool = False,
    native: bool = True,
    groups: RankGroups | None = None,
) -> LoadedModel:
    """Let every tensor of an image look into `arena`, which has the image's layout; touches no weight.

    Args:
        arena: need not be resident yet.
        modules: use transformers' modules even for a model that the flat loop can compute.
        native: let the flat loop use the native kernels where they can be used.
        groups: the other ranks, if the image holds a rank's part.

    Raises:
        ImageFailure: image and module disagree; the message names the tensors.
        UnsupportedModel: transformers is another version than the image was made with, and serves this model no more.
    """
    facts = msgspec.convert(dict(image.metadata), ImageSpec)
    slot_names = slot_names_of(image)
    shard = Shard.of(image)
    assert (shard is None) == (groups is None), "groups are for the image of a rank's part"
    if shard is not None and groups is not None:
        plan = shard.plan
        if isinstance(plan, ModulePlan):
            return _bind_rank_module(image, arena, facts, plan, groups)
        return _bind_rank(image, arena, facts, plan, groups, native=native)
    decoder = None if modules else _bind_flat(image, arena, facts, slot_names, native=native)
    if decoder is not None:
        return LoadedModel(facts, decoder, slot_names)
    config = read_image_config(image)
    facts = _current_facts(facts, config)
    module = _bind_module(image, arena, facts, config)
    return LoadedModel(facts, ModuleDecoder(module, facts.attention.windows), slot_names)


def _bind_flat(
    image: WeightImage, arena: Arena, facts: ImageSpec, slot_names: dict[str, str], *, native: bool
) -> FusedDecoder | None:
    """The flat loop, which needs neither transformers nor the checkpoint's config; None if it is not for this model."""
    if facts.fused is None:
        return None
    slots = _slots_by_name(image, slot_names)
    weights = wide_weights(slots, partial(arena_view, arena), num_layers=facts.fused.num_layers)
    if weights is None:
        return None
    frequencies = buffers_of(image)[INVERSE_FREQUENCIES]
    return FusedDecoder(facts.fused, weights, frequencies, facts.attention.windows, native=native)


def _bind_rank(
    image: WeightImage, arena: Arena, facts: ImageSpec, plan: ShardPlan, groups: RankGroups, *, native: bool
) -> LoadedModel:
    assert facts.fused is not None, "only recognised models are split"
    slot_names = slot_names_of(image)
    weights = rank_weights(_slots_by_name(image, slot_names), partial(arena_view, arena), plan)
    frequencies = buffers_of(image)[INVERSE_FREQUENCIES]
    windows = facts.attention.windows
    decoder = RankDecoder(plan, facts.fused, weights, frequencies, windows, groups=groups, native=native)
    if native and plan.spec.rank == 0 and not decoder.native_tokens:
        num_ranks = plan.spec.tp_size * plan.spec.pp_size
        logger.info("Each of %d ranks computes with torch, not with the native kernels.", num_ranks)
    return LoadedModel(facts, decoder, slot_names, plan)


def _bind_rank_module(
    image: WeightImage, arena: Arena, facts: ImageSpec, plan: ModulePlan, groups: RankGroups
) -> LoadedModel:
    config = read_image_config(image)
    _require_same_split(image, facts, config, plan)
    part = RankModule(
        _blank_module(facts, config),
        plan,
        add_up=groups.add_up,
        side_by_side=lambda columns: groups.side_by_side(columns, plan),
    )
    bind_module(part.module, image, arena)
    part.attach_tied_head()
    decoder = RankModuleDecoder(part, facts.attention.windows, groups, torch_dtype(facts.dtype))
    return LoadedModel(facts, decoder, slot_names_of(image), plan)


def _require_same_split(image: WeightImage, facts: ImageSpec, config: Any, plan: ModulePlan) -> None:
    """If transformers has changed since the image was made, it must still divide the model so.

    Raises:
        ImageFailure: it divides the model otherwise.
        UnsupportedModel: not at all.
    """
    from transformers import __version__

    if facts.transformers == __version__:
        return
    spec = plan.spec
    attention = check(config)
    found = divide(config, attention, RankPlace(spec.rank, spec.tp_size, spec.pp_size)).with_tie(plan.split.tied)
    if found != plan.split or attention.windows[spec.layers.start : spec.layers.stop] != facts.attention.windows:
        raise ImageFailure(
            f"{image.path} was made with transformers {facts.transformers}; {__version__} divides models of type "
            f"{config.model_type!r} among ranks in another way. Remove the image to have it rebuilt."
        )


def _slots_by_name(image: WeightImage, slot_names: dict[str, str]) -> dict[str, Slot]:
    return {name: image.layout.slots[slot_name] for name, slot_name in slot_names.items()}


def _bind_module(image: WeightImage, arena: Arena, facts: ImageSpec, config: Any) -> Any:
    module = _blank_module(facts, config)
    bind_module(module, image, arena)
    return module


def _blank_module(facts: ImageSpec, config: Any) -> Any:
    attention.register()
    with quiet():
        return build_module(config, dtype=torch_dtype(facts.dtype), attention=attention.IMPLEMENTATION)


def _current_facts(facts: ImageSpec, config: Any) -> ImageSpec:
    """The image's facts; the model is examined again if transformers has changed since the image was made."""
    from transformers import __version__

    if facts.transformers == __version__:
        return facts
    return replace(facts, attention=check(config), transformers=__version__)
