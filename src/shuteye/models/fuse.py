"""Which weights lie next to each other, so that several projections can be read as one wider matrix.

Knows nothing of bytes or files. Only the layout is decided here so far: this is the seam where fused
execution will go, and nothing is executed differently yet.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

FUSABLE = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Projections of one input that can be one matrix; their order is the order of their rows."""

_LAYER = re.compile(r"^(?:.*?\.)?(?:layers|h|blocks)\.\d+(?=\.)")


def group_of(name: str) -> str:
    """The layer a tensor belongs to (`model.layers.3`), or its own module: what is brought in together."""
    match = _LAYER.match(name)
    return match[0] if match else name.rpartition(".")[0]


def layout_order(names: Sequence[str]) -> list[str]:
    """`names` in the order they are laid out: layer by layer as given, with fusable projections adjacent.

    Projections of one set are ordered kind by kind: all their weights, then all their biases, so that the fused
    weight and the fused bias are each one contiguous range.
    """
    place = {name: index for index, name in enumerate(names)}
    anchors: dict[tuple[str, str], int] = {}
    for name in names:
        key = _fused_key(name)
        if key is not None:
            anchors[key[:2]] = min(anchors.get(key[:2], place[name]), place[name])

    def sort_key(name: str) -> tuple[int, str, int, int]:
        key = _fused_key(name)
        if key is None:
            return (place[name], "", 0, 0)
        parent, members, kind, index = key
        return (anchors[parent, members], _KIND_ORDER.get(kind, "z" + kind), index, place[name])

    return sorted(names, key=sort_key)


_KIND_ORDER = {"weight": "a", "bias": "b"}


def _fused_key(name: str) -> tuple[str, str, str, int] | None:
    """(parent module, which set, weight or bias, place in the set) of a fusable tensor."""
    module, _, kind = name.rpartition(".")
    parent, _, leaf = module.rpartition(".")
    for members in FUSABLE:
        if leaf in members:
            return parent, members[0], kind, members.index(leaf)
    return None


@dataclass(frozen=True, slots=True)
class FusableProjections:
    """Linear layers whose weights lie one after another in memory: rows of one matrix, read without a copy."""

    parent: str
    members: tuple[str, ...]
    num_rows: int


def fusable_projections(module: nn.Module) -> list[FusableProjections]:
    """The sets of projections of a bound module that could be one matrix product each."""
    found: list[FusableProjections] = []
    for name, parent in module.named_modules():
        for members in FUSABLE:
            layers = [getattr(parent, member, None) for member in members]
            linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
            if len(linears) == len(members) and _adjacent(layer.weight for layer in linears):
                found.append(FusableProjections(name, members, sum(layer.out_features for layer in linears)))
    return found


def _adjacent(weights: Iterable[torch.Tensor]) -> bool:
    end: int | None = None
    for weight in weights:
        if not weight.is_contiguous() or (end is not None and weight.data_ptr() != end):
            return False
        end = weight.data_ptr() + weight.nbytes
    return True
