"""One rank's part of a model that transformers' modules compute: modules cut to size, and what they exchange.

Knows nothing of transformers' plans: what is cut, `parallel/module_shards.py` says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shuteye.matrices.bfloat16 import float32_of
from shuteye.models.attention import AttentionContext, attending
from shuteye.models.packed_weight import PackedWeight
from shuteye.models.rank_groups import RankGroups
from shuteye.models.tensors import numbers_of, tensor_of
from shuteye.parallel.module_shards import Exchange, ModulePlan
from shuteye.parallel.shards import part_shape

if TYPE_CHECKING:
    from shuteye.cache.kv_cache import KVCache
    from shuteye.tasks.generate.runner import PackedBatch


class RankModule:
    """A transformers module of which only a rank's part is left; what is not is passed over.

    Layers of other stages keep their places, so that every layer is still asked by its own number: those before the
    rank's own give the hidden states that were received, those behind keep what they get to be sent.

    Args:
        module: of the whole model, on meta; is changed.
        add_up: adds, in place, what every rank of the stage has of a contiguous tensor.
        side_by_side: puts the ranks' columns of logits together where the sampler is.
    """

    def __init__(
        self,
        module: Any,
        plan: ModulePlan,
        *,
        add_up: Callable[[Tensor], object],
        side_by_side: Callable[[Tensor], Tensor],
    ) -> None:
        self.module = module
        self.plan = plan
        self._add_up = add_up
        self._side_by_side = side_by_side
        self._received: Tensor | None = None
        self._passed_on: Tensor | None = None
        self._cut_parameters()
        self._leave_out_other_stages()
        for name, exchange in plan.split.exchanges.items():
            if plan.has_module(name):
                self._exchange_around(name, exchange)
        if plan.has_head:
            self._head.register_forward_hook(self._gather_columns)

    def attach_tied_head(self) -> None:
        """Once the embedding has its memory: the head's rows are those of the embedding that is here."""
        plan, split = self.plan, self.plan.split
        if split.tied and plan.embeds and plan.has_head:
            embedding = self.module.get_parameter(split.embedding)
            self._head.weight = _rows(embedding, plan.vocabulary)

    def __call__(self, token_ids: Tensor, hidden_in: Tensor | None, *, wanted: Tensor, **inputs: Any) -> Tensor:
        """Compute the part.

        Args:
            token_ids: [1, num_tokens].
            hidden_in: [num_tokens, hidden_size], after the stage before; None on the first.
            wanted: the tokens whose logits are computed.
            inputs: whatever else the module takes.

        Returns:
            Hidden states [num_tokens, hidden_size], or logits [num_wanted, vocab_size]; of those the rank's own columns
            where it does not hold the sampler.
        """
        self._received = None if hidden_in is None else hidden_in[None]
        inputs["input_ids" if hidden_in is None else "inputs_embeds"] = (
            token_ids if hidden_in is None else self._received
        )
        try:
            if self.plan.has_head:
                logits: Tensor = self.module(**inputs, logits_to_keep=wanted).logits[0]
                return logits
            self.module.base_model(**inputs)
            assert self._passed_on is not None
            return self._passed_on[0]
        finally:
            self._received = self._passed_on = None

    # --- what is left of the module -------------------------------------------------------------

    @property
    def _head(self) -> Any:
        return self.module.get_submodule(self.plan.split.head.rpartition(".")[0])

    def _cut_parameters(self) -> None:
        split, plan = self.plan.split, self.plan
        for name, whole in list(self.module.named_parameters(remove_duplicate=False)):
            owner, leaf = self.module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            part = plan.part_of(name, whole.shape)
            elsewhere = (name == split.embedding and not plan.embeds) or (name == split.head and not plan.has_head)
            if name == split.head and split.tied and plan.embeds and plan.has_head:
                del owner._parameters[leaf]  # see `attach_tied_head`
            elif part is None or elsewhere:
                owner.register_parameter(leaf, None)
            else:
                blank = torch.empty(part_shape(part, whole.shape), dtype=whole.dtype, device="meta")
                owner.register_parameter(leaf, nn.Parameter(blank, requires_grad=False))

    def _leave_out_other_stages(self) -> None:
        layers = self.module.get_submodule(self.plan.split.layers)
        mine = self.plan.spec.layers
        for index, layer in enumerate(layers):
            if index not in mine:
                layer._modules.clear()
                layer._buffers.clear()
                layer.forward = self._give if index < mine.start else self._keep
        if not self.plan.has_head:
            for name in self.plan.split.after:
                owner, _, leaf = name.rpartition(".")
                setattr(self.module.get_submodule(owner), leaf, nn.Identity())

    def _give(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        assert self._received is not None
        return self._received

    def _keep(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        self._passed_on = hidden_states
        return hidden_states

    # --- what ranks of a stage exchange ---------------------------------------------------------

    def _exchange_around(self, name: str, exchange: Exchange) -> None:
        part = self.module.get_submodule(name)
        if exchange == "sum":
            part.register_forward_hook(self._sum)
            return
        weight = self.plan.split.tensors[f"{name}.weight"]
        rows = weight.rows(self.plan.spec)
        if exchange == "gather":
            part.register_forward_hook(partial(self._assemble, rows, weight.width))
        else:
            part.register_forward_pre_hook(partial(_take, rows))
            part.register_forward_hook(self._sum)

    def _sum(self, _part: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        total = output.contiguous()
        self._add_up(total)
        return total

    def _assemble(self, rows: range, width: int, _part: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        """All ranks' columns on all of them: each adds its own to zeros, which changes no number."""
        whole = output.new_zeros((*output.shape[:-1], width))
        whole[..., rows.start : rows.stop] = output
        return self._sum(_part, _inputs, whole)

    def _gather_columns(self, _part: nn.Module, _inputs: Any, logits: Tensor) -> Tensor:
        """Logits of the whole vocabulary, on the rank that holds the sampler."""
        return self._side_by_side(logits[0])[None]


def _rows(weight: Tensor, rows: range) -> Tensor:
    """Some rows of a weight that shares its memory."""
    if isinstance(weight, PackedWeight):
        return weight.rows(rows.start, rows.stop)
    return weight[rows.start : rows.stop]


def _take(rows: range, _part: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The rank's columns of an input that is whole."""
    return (inputs[0][..., rows.start : rows.stop], *inputs[1:])


class RankModuleDecoder:
    """The rank's part of a packed step, by a transformers module.

    Attributes:
        native_tokens: the largest step that native kernels compute: none.
    """

    native_tokens = 0

    def __init__(self, part: RankModule, windows: Sequence[int | None], groups: RankGroups, dtype: str) -> None:
        self._part = part
        self._windows = windows
        self._groups = groups
        self._dtype = dtype

    @torch.inference_mode()
    def forward(self, batch: PackedBatch, kv_cache: KVCache) -> NDArray[np.float32]:
        """Compute the rank's part of a step; what it gives is said at `RankDecoder.forward`."""
        plan = self._part.plan
        context = AttentionContext(batch, kv_cache, self._windows, first_layer=plan.spec.layers.start)
        hidden = self._groups.receive((batch.num_tokens, plan.split.hidden_size), self._dtype, plan)
        with attending(context):
            found = self._part(
                torch.from_numpy(batch.input_ids)[None],
                None if hidden is None else tensor_of(hidden),
                wanted=torch.from_numpy(batch.logits_indices),
                position_ids=torch.from_numpy(batch.positions)[None],
                use_cache=False,
            )
        numbers = numbers_of(found)
        self._groups.pass_on(numbers, plan)
        return float32_of(numbers)
