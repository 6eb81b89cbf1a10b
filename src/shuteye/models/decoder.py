"""A model that generates, bound to an arena: its tensors are views, its forward takes packed batches.

Imports torch only for models that need it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from shuteye.memory.arena import Arena
from shuteye.memory.image import WeightImage
from shuteye.memory.layout import Slot
from shuteye.models.binding import BoundModel, Shard, slot_names_of
from shuteye.models.flat_weights import FlatWeights
from shuteye.models.fused import INVERSE_FREQUENCIES, FusedDecoder
from shuteye.models.image_spec import ImageSpec
from shuteye.models.rank_decoder import RankDecoder
from shuteye.models.rank_groups import RankGroups
from shuteye.parallel.module_shards import ModulePlan
from shuteye.parallel.shards import ShardPlan

if TYPE_CHECKING:
    from shuteye.cache.kv_cache import KVCache
    from shuteye.models.module_decoder import ModuleDecoder
    from shuteye.models.rank_module import RankModuleDecoder
    from shuteye.tasks.generate.runner import PackedBatch

logger = logging.getLogger(__name__)


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

    def forward(self, batch: PackedBatch, kv_cache: KVCache) -> NDArray[np.float32]:
        """Compute a packed step: its keys and values go to the cache.

        Returns:
            Logits [num_sampled, vocab_size] of the tokens in `batch.logits_indices`, in that order. On a rank
            that does not hold the sampler, what it computed instead: see `RankDecoder.forward`.
        """
        return self.decoder.forward(batch, kv_cache)


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
        native: let the native kernels be used where they can.
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
        if isinstance(plan, ShardPlan):
            decoder = _bind_rank(image, arena, facts, plan, groups, native=native)
            return LoadedModel(facts, decoder, slot_names, plan)
        from shuteye.models.module_decoder import bind_rank_module

        return LoadedModel(facts, bind_rank_module(image, arena, facts, plan, groups, native=native), slot_names, plan)
    if facts.fused is not None and not modules:
        return LoadedModel(facts, _bind_flat(image, arena, facts, native=native), slot_names)
    from shuteye.models.module_decoder import bind_modules

    facts, module_decoder = bind_modules(image, arena, facts, native=native)
    return LoadedModel(facts, module_decoder, slot_names)


def _bind_flat(image: WeightImage, arena: Arena, facts: ImageSpec, *, native: bool) -> FusedDecoder:
    """The flat loop, which needs neither transformers nor the checkpoint's config."""
    assert facts.fused is not None
    windows = facts.attention.windows
    weights = FlatWeights.of_model(_slots_by_name(image), arena, windows, num_layers=facts.fused.num_layers)
    return FusedDecoder(facts.fused, weights, _frequencies(image), windows, native=native)


def _bind_rank(
    image: WeightImage, arena: Arena, facts: ImageSpec, plan: ShardPlan, groups: RankGroups, *, native: bool
) -> RankDecoder:
    assert facts.fused is not None, "only recognised models are split so"
    windows = facts.attention.windows
    weights = FlatWeights.of_rank(_slots_by_name(image), arena, windows, plan)
    decoder = RankDecoder(plan, facts.fused, weights, _frequencies(image), windows, groups=groups, native=native)
    if native and plan.spec.rank == 0 and not decoder.native_tokens:
        num_ranks = plan.spec.tp_size * plan.spec.pp_size
        logger.info("Each of %d ranks computes with torch, not with the native kernels.", num_ranks)
    return decoder


def _frequencies(image: WeightImage) -> NDArray[np.float32]:
    return np.frombuffer(image.read_buffers()[INVERSE_FREQUENCIES].content, np.float32)


def _slots_by_name(image: WeightImage) -> dict[str, Slot]:
    """Every name, tied ones included."""
    return {name: image.layout.slots[slot_name] for name, slot_name in slot_names_of(image).items()}
