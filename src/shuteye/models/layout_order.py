"""Which weights lie next to each other, so that several projections can be read as one wider matrix.

Knows nothing of bytes or files, nor of how the wider matrix is used (`fused.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

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
