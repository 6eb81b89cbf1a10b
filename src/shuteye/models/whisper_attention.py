"""The decoder's memory of one window, and attention over those of several requests at once: no padding, no copies.

Knows nothing of Whisper beyond how its attention calls a cache; a row of a batch is a request, with a cache of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

IMPLEMENTATION = "shuteye_speech"
"""The name to set as `config._attn_implementation`."""


def register() -> None:
    """Make the attention known to transformers; harmless if it is already."""
    AttentionInterface.register(IMPLEMENTATION, _attend)


def new_cache() -> Any:
    """An empty memory: self-attention grows by a token each step, cross-attention is filled by the first."""
    return EncoderDecoderCache(DynamicCache(), DynamicCache())


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor | Sequence[torch.Tensor],
    value: torch.Tensor | Sequence[torch.Tensor],
    attention_mask: torch.Tensor | None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' SDPA, row by row where rows have keys of their own."""
    if isinstance(key, torch.Tensor):
        found: torch.Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)[0]
        return found, None
    rows = [
        sdpa_attention_forward(module, query[index : index + 1], key[index], value[index], attention_mask, **arguments)[
            0
        ]
        for index in range(len(key))
    ]
    return torch.cat(rows), None


class RowsCache(EncoderDecoderCache):  # type: ignore[misc]  # Whisper's attention asks for this very class
    """Several requests' memories seen as one batch's, for a step of one token each.

    What attention gets of it are lists, a tensor per row, that only `_attend` understands.
    """

    def __init__(self, rows: Sequence[Any]) -> None:
        self.self_attention_cache = _Rows([row.self_attention_cache for row in rows])
        self.cross_attention_cache = _Rows([row.cross_attention_cache for row in rows])
        self.is_updated = dict.fromkeys(range(len(self.cross_attention_cache.layers)), True)


class _Rows(DynamicCache):  # type: ignore[misc]  # for what masks ask of a cache
    """One kind of memory of several requests."""

    def __init__(self, rows: Sequence[Any]) -> None:
        super().__init__()
        self._rows = rows
        self.layers = [_RowsLayer([row.layers[index] for row in rows]) for index in range(len(rows[0].layers))]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Append each row's new key and value to its own."""
        found = [
            row.update(key_states[index : index + 1], value_states[index : index + 1], layer_idx)
            for index, row in enumerate(self._rows)
        ]
        return [keys for keys, _ in found], [values for _, values in found]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Some row's; positions are given explicitly, so that nobody counts with it."""
        length: int = self._rows[0].get_seq_length(layer_idx)
        return length


class _RowsLayer:
    """One layer's keys and values, a tensor per row."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.keys = [row.keys for row in rows]
        self.values = [row.values for row in rows]
