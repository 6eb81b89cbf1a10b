"""Models that generate by transformers' modules, whole or a rank's part: every parameter a view of an arena."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from shuteye.errors import ImageFailure
from shuteye.memory.arena import Arena
from shuteye.memory.image import WeightImage
from shuteye.models import attention
from shuteye.models.attention import AttentionContext, attending
from shuteye.models.binding import read_image_config
from shuteye.models.image_spec import ImageSpec
from shuteye.models.module_binding import bind_module
from shuteye.models.module_split import divide
from shuteye.models.modules import build_module, quiet
from shuteye.models.rank_groups import RankGroups
from shuteye.models.rank_module import RankModule, RankModuleDecoder
from shuteye.models.support import check
from shuteye.models.tensors import numbers_of, tensor_of, torch_dtype
from shuteye.parallel.module_shards import ModulePlan
from shuteye.parallel.shards import RankPlace

if TYPE_CHECKING:
    from shuteye.cache.kv_cache import KVCache
    from shuteye.tasks.generate.runner import PackedBatch


class ModuleDecoder:
    """A transformers module whose parameters are views of an arena and whose attention is paged.

    Attributes:
        native_tokens: the largest step that native kernels compute: none.
    """

    native_tokens = 0

    def __init__(self, module: Any, windows: Sequence[int | None]) -> None:
        self.module = module
        self._windows = windows

    @torch.inference_mode()
    def forward(self, batch: PackedBatch, kv_cache: KVCache) -> NDArray[np.float32]:
        """Logits [num_sampled, vocab_size] of the tokens in `batch.logits_indices`, in that order."""
        with attending(AttentionContext(batch, kv_cache, self._windows)):
            output = self.module(
                input_ids=torch.from_numpy(batch.input_ids)[None],
                position_ids=torch.from_numpy(batch.positions)[None],
                use_cache=False,
                logits_to_keep=torch.from_numpy(batch.logits_indices),
            )
        logits: NDArray[np.float32] = output.logits[0].float().numpy()
        return logits


def bind_modules(
    image: WeightImage, arena: Arena, facts: ImageSpec, *, native: bool = True
) -> tuple[ImageSpec, ModuleDecoder]:
    """A whole model, and its facts; it is examined again if transformers has changed since the image was made.

    Raises:
        ImageFailure: image and module disagree; the message names the tensors.
        UnsupportedModel: transformers is another version than the image was made with, and serves this model no more.
    """
    from transformers import __version__

    config = read_image_config(image)
    if facts.transformers != __version__:
        facts = replace(facts, attention=check(config), transformers=__version__)
    module = _blank_module(facts, config)
    bind_module(module, image, arena, native=native)
    return facts, ModuleDecoder(module, facts.attention.windows)


def bind_rank_module(
    image: WeightImage, arena: Arena, facts: ImageSpec, plan: ModulePlan, groups: RankGroups, *, native: bool
) -> RankModuleDecoder:
    """A rank's part; raises as `bind_modules`."""
    config = read_image_config(image)
    _require_same_split(image, facts, config, plan)
    part = RankModule(
        _blank_module(facts, config),
        plan,
        add_up=lambda product: groups.add_up(numbers_of(product)),
        side_by_side=lambda columns: tensor_of(groups.side_by_side(numbers_of(columns), plan)),
    )
    bind_module(part.module, image, arena, native=native)
    part.attach_tied_head()
    return RankModuleDecoder(part, facts.attention.windows, groups, facts.dtype)


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
    found_attention = check(config)
    found = divide(config, found_attention, RankPlace(spec.rank, spec.tp_size, spec.pp_size))
    windows = found_attention.windows[spec.layers.start : spec.layers.stop]
    same = found.with_tie(plan.split.tied).with_multiple(plan.split.multiple)
    if same != plan.split or windows != facts.attention.windows:
        raise ImageFailure(
            f"{image.path} was made with transformers {facts.transformers}; {__version__} divides models of type "
            f"{config.model_type!r} among ranks in another way. Remove the image to have it rebuilt."
        )


def _blank_module(facts: ImageSpec, config: Any) -> Any:
    attention.register()
    with quiet():
        return build_module(config, dtype=torch_dtype(facts.dtype), attention=attention.IMPLEMENTATION)
