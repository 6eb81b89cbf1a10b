"""How transformers' own plans say that a model's modules may be divided among ranks: read, checked, made into cuts.

`base_model_tp_plan` of a config and `_tp_plan` of its class name a style for modules and parameters; what
`base_model_pp_plan` names is computed one after the other. Nothing of transformers' placement is used. What is not
understood is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import nn

from shuteye.errors import UnsupportedModel
from shuteye.models.image_spec import AttentionSpec
from shuteye.models.modules import build_module, quiet, tied_names
from shuteye.models.support import probe_part
from shuteye.parallel.module_shards import Exchange, ModuleSplit, TensorSplit, plan_modules
from shuteye.parallel.shards import ROW_MULTIPLE, RankPlace

_WHOLE = frozenset({"replicated_with_grad_allreduce", "replicate", "embedding_rowwise"})
"""Every rank of a stage has all of it: so they say, or, as the embedding, it is left whole to save a sum (ADR 16)."""
_EXCHANGES: Mapping[str, Exchange] = {
    "rowwise": "sum",
    "moe_tp_experts": "sum",
    "rowwise_split_input": "sum_of_slices",
    "rowwise_rep": "sum_of_slices",
    "colwise_gather_output": "gather",
    "colwise_rep": "gather",
}
"""Styles after which, or around which, ranks exchange tensors."""
_ROWS = frozenset({"colwise", "colwise_gather_output", "colwise_rep"})
"""Styles of a linear layer whose weight is cut in dimension 0, with its bias."""
_COLUMNS = frozenset({"rowwise", "rowwise_split_input", "rowwise_rep"})
"""Styles of a linear layer whose weight is cut in dimension 1; its bias is added once."""
_ATTENTION = frozenset({"self_attn", "attention", "attn"})
"""What the module with the heads of a layer is called."""
_HEAD_BY_HEAD = frozenset({("gpt_neox", "query_key_value")})
"""Fused projections whose rows are query, key and value of one head after the other's; no plan tells."""


def divide(config: Any, attention: AttentionSpec, place: RankPlace) -> ModuleSplit:
    """How the model of `config` is cut for as many ranks as `place` is one of; every rank's part is run once on meta.

    Args:
        attention: of the whole model.

    Raises:
        UnsupportedModel: transformers has no plan, or one that is not understood, or the parts do not compute, or
            there are too many ranks; the message names what.
    """
    with quiet():
        module = build_module(config, dtype=torch.bfloat16, attention="eager", buffers_on_meta=True)
    split = _Reader(config, module, attention, place).read()
    for each in place.all():
        probe_part(config, plan_modules(split, each), attention)
    return split


@dataclass(frozen=True)
class _Reader:
    config: Any
    module: Any
    attention: AttentionSpec
    place: RankPlace

    def read(self) -> ModuleSplit:
        module, plan, order = self.module, self._plan, self._order
        parameters = dict(module.named_parameters(remove_duplicate=False))
        tensors = {name: self._place(name, tuple(each.shape)) for name, each in parameters.items()}
        exchanges: dict[str, Exchange] = {}
        if plan:
            self._check_units()
            for name, part in module.named_modules():
                tensors |= self._cut_module(name, part, tensors)
            tensors |= self._cut_parameters(tensors)
            if not any(each.dimension is not None for each in tensors.values() if each.layer is not None):
                self._refuse("its `tp_plan` divides nothing in its layers")
            exchanges = {name: _EXCHANGES[style] for name, style in self._styled() if style in _EXCHANGES}
            exchanges.pop(self._head, None)
        numel = sum(parameters[name].numel() for name, each in tensors.items() if each.layer is not None)
        return ModuleSplit(
            num_layers=self.attention.num_layers,
            num_kv_heads=self.attention.num_kv_heads,
            attention=any(self._is_attention(name) for name, style in self._styled() if style == "colwise"),
            hidden_size=self.config.hidden_size,
            vocab_size=tensors[f"{self._head}.weight"].shape[0],
            layers=self._layers,
            layer_numel=numel // self.attention.num_layers,
            embedding=f"{self._embedding}.weight",
            head=f"{self._head}.weight",
            tied=f"{self._head}.weight" in tied_names(module),
            after=tuple(name for name in order[order.index(self._layers) + 1 :]),
            tensors=tensors,
            exchanges=exchanges,
        )

    # --- names ----------------------------------------------------------------------------------

    @cached_property
    def _prefix(self) -> str:
        return f"{self.module.base_model_prefix}."

    @cached_property
    def _names(self) -> dict[int, str]:
        return {id(part): name for name, part in self.module.named_modules()}

    @cached_property
    def _embedding(self) -> str:
        return self._names[id(self.module.get_input_embeddings())]

    @cached_property
    def _head(self) -> str:
        return self._names[id(self.module.get_output_embeddings())]

    @cached_property
    def _plan(self) -> Mapping[str, str]:
        """Styles by name, with `*` for the numbers of layers; empty unless there are several ranks in a stage."""
        if self.place.tp_size == 1:
            return {}
        base: Mapping[str, str] = self.config.base_model_tp_plan or {}
        own: Mapping[str, str] = type(self.module)._tp_plan or {}
        if not base or self._head not in own:
            self._refuse("transformers has no `tp_plan` for it")
        return {f"{self._prefix}{name}": style for name, style in base.items()} | dict(own)

    @cached_property
    def _layers(self) -> str:
        """The list of layers, by name."""
        lists = [
            f"{self._prefix}{name}"
            for name, part in self.module.base_model.named_children()
            if isinstance(part, nn.ModuleList) and len(part) == self.attention.num_layers
        ]
        if len(lists) != 1:
            self._refuse(f"its layers are not one list ({', '.join(lists) or 'none'})")
        return lists[0]

    def _styled(self) -> Iterator[tuple[str, str]]:
        """Every module of the model that has a style."""
        for name, _ in self.module.named_modules():
            style = self._style(name)
            if style is not None:
                yield name, style

    def _style(self, name: str) -> str | None:
        return self._plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))

    @cached_property
    def _order(self) -> tuple[str, ...]:
        """What is computed one after the other, by name."""
        plan = self.config.base_model_pp_plan or {}
        if self.place.pp_size > 1 and not plan:
            self._refuse("transformers has no `pp_plan` for it", param="pipeline_parallel_size")
        order = tuple(f"{self._prefix}{name}" for name in plan)
        if self.place.pp_size == 1:
            return order if self._layers in order else (self._layers,)
        takes, gives = plan.get(self._layers.removeprefix(self._prefix), ([], []))
        if list(takes)[:1] != ["hidden_states"] or list(gives) != ["hidden_states"] or self._embedding not in order:
            self._refuse(
                "its `pp_plan` does not pass hidden states from layer to layer", param="pipeline_parallel_size"
            )
        return order

    def _is_attention(self, name: str) -> bool:
        """Whether a module is a child of what has the heads of a layer."""
        return name.rpartition(".")[0].rpartition(".")[2] in _ATTENTION

    # --- stages ---------------------------------------------------------------------------------

    def _place(self, name: str, shape: tuple[int, ...]) -> TensorSplit:
        """A whole tensor, in its layer, or before or after the layers."""
        if name.startswith(f"{self._layers}."):
            return TensorSplit(shape, layer=int(name.removeprefix(f"{self._layers}.").partition(".")[0]))
        owner = next((each for each in self._order if name.startswith(f"{each}.")), None)
        is_head = name.startswith(f"{self._head}.")
        if self.place.pp_size > 1 and owner is None and not is_head:
            self._refuse(f"its `pp_plan` does not say on which stage {name} is", param="pipeline_parallel_size")
        order = self._order
        is_after = owner is not None and order.index(owner) > order.index(self._layers)
        return TensorSplit(shape, last=is_head or is_after)

    # --- cuts -----------------------------------------------------------------------------------

    def _cut_module(self, name: str, part: nn.Module, whole: Mapping[str, TensorSplit]) -> dict[str, TensorSplit]:
        """The tensors of one linear layer, by its style."""
        style = self._style(name)
        if style is None or style in _WHOLE or style == "moe_tp_experts":
            return {}
        if style not in _ROWS | _COLUMNS:
            self._refuse(f"its `tp_plan` has the style {style!r} for {name}, which is not known here")
        if not isinstance(part, nn.Linear):
            self._refuse(f"its `tp_plan` has the style {style!r} for {name}, which is a {type(part).__name__}")
        dimension = 0 if style in _ROWS else 1
        weight = whole[f"{name}.weight"]
        by_group = self._is_attention(name) and style in ("colwise", "rowwise")
        multiple = self._rows_of_group(name, weight.shape[dimension], style) if by_group else ROW_MULTIPLE
        found = {f"{name}.weight": replace(weight, dimension=dimension, multiple=multiple, by_group=by_group)}
        if part.bias is not None and dimension == 0:
            bias = whole[f"{name}.bias"]
            found[f"{name}.bias"] = replace(bias, dimension=0, multiple=multiple, by_group=by_group)
        elif part.bias is not None:
            found[f"{name}.bias"] = replace(whole[f"{name}.bias"], once=True)
        return found

    def _rows_of_group(self, name: str, width: int, style: str) -> int:
        """Rows of a projection that belong to one KV group, and lie together."""
        groups, head_dim = self.attention.num_kv_heads, self.attention.head_dim
        known = {self._query_width(name), groups * head_dim, self._query_width(name) // head_dim}
        fused = (self.config.model_type, name.rpartition(".")[2]) in _HEAD_BY_HEAD
        if width % groups or (style == "colwise" and width not in known and not fused):
            self._refuse(
                f"{name} has {width} rows, of which it is not known which belong to which of {groups} KV heads"
            )
        return width // groups

    def _query_width(self, name: str) -> int:
        """Rows of all query heads: what the output projection beside `name` takes."""
        owner = self.module.get_submodule(name.rpartition(".")[0])
        path = self._names[id(owner)]
        outputs = [part for leaf, part in owner.named_children() if self._style(f"{path}.{leaf}") == "rowwise"]
        if len(outputs) != 1:
            self._refuse(f"its `tp_plan` cuts {name}, but has no one output projection ('rowwise') beside it")
        return int(outputs[0].in_features)

    def _cut_parameters(self, whole: Mapping[str, TensorSplit]) -> dict[str, TensorSplit]:
        """Parameters that the plan names themselves: those of experts, which lie in one tensor."""
        found = {}
        for name, tensor in whole.items():
            owner, style = name.rpartition(".")[0], self._style(name)
            of_experts = self._style(owner) == "moe_tp_experts"
            if style is None and not of_experts:
                continue
            if not of_experts or style not in ("packed_colwise", "rowwise") or len(tensor.shape) != 3:
                self._refuse(
                    f"its `tp_plan` has the style {style!r} for {name} {tensor.shape}, which is not known here"
                )
            packed = style == "packed_colwise"
            found[name] = replace(tensor, dimension=1 if packed else 2, times=2 if packed else 1)
        self._check_experts(found)
        return found

    # --- what must fit together -----------------------------------------------------------------

    def _check_units(self) -> None:
        """Beside a projection that is left in parts ('colwise') is one that takes parts ('rowwise'), as wide."""
        for path, owner in self.module.named_modules():
            widths: dict[str, set[int]] = {"colwise": set(), "rowwise": set()}
            for leaf, part in owner.named_children():
                style = self._style(f"{path}.{leaf}")
                if style in widths and isinstance(part, nn.Linear):
                    widths[style].add(part.out_features if style == "colwise" else part.in_features)
            if not widths["colwise"] and not widths["rowwise"]:
                continue
            if not widths["colwise"] or not widths["rowwise"]:
                self._refuse(f"its `tp_plan` cuts only one side of {path}")
            if path.rpartition(".")[2] not in _ATTENTION and widths["colwise"] != widths["rowwise"]:
                self._refuse(f"its `tp_plan` cuts {path} into parts that do not fit together: {widths}")

    def _check_experts(self, found: Mapping[str, TensorSplit]) -> None:
        """All parts of one module of experts are as wide."""
        widths: dict[str, set[int]] = {}
        for name, tensor in found.items():
            widths.setdefault(name.rpartition(".")[0], set()).add(tensor.width)
        for owner, each in widths.items():
            if len(each) > 1:
                self._refuse(f"its `tp_plan` cuts {owner} into parts that do not fit together: {sorted(each)}")

    def _refuse(self, why: str, *, param: str = "tensor_parallel_size") -> NoReturn:
        raise UnsupportedModel(
            f"Models of type {self.config.model_type!r} cannot be divided so: {why}; leave out {param}.", param=param
        )
