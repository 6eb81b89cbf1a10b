"""Paged attention for transformers' AttentionInterface: new keys and values go to the cache, then all attend.

What a model asks of attention and this cannot do is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from shuteye.errors import UnsupportedModel
from shuteye.models.kv_tensors import KVTensors

if TYPE_CHECKING:
    from shuteye.cache.kv_cache import KVCache
    from shuteye.tasks.generate.runner import PackedBatch

IMPLEMENTATION = "shuteye_paged"
"""The name to set as `config._attn_implementation`."""

IGNORED_ARGUMENTS = frozenset(
    # What these say is in the batch already, or does not change the result.
    {"position_ids", "position_embeddings", "use_cache", "output_attentions", "output_hidden_states", "return_dict"}
)


def check_arguments(arguments: dict[str, Any]) -> None:
    """Refuse what a model passes to attention and we would drop.

    Raises:
        UnsupportedModel: an argument is set that changes the result; the message names it.
    """
    for name, value in arguments.items():
        unset = value is None or (isinstance(value, bool | int | float) and not value)
        if unset or name in IGNORED_ARGUMENTS:
            continue
        known = {"s_aux": "attention sinks", "sinks": "attention sinks", "softcap": "softcapping of attention logits"}
        what = known.get(name, name.replace("_", " "))
        raise UnsupportedModel(f"Its attention needs {what} (`{name}`), which paged attention does not do.")


# --- one step's view of the cache, shared by all layers -------------------------------------------


def _mask(query_positions: torch.Tensor, lengths: torch.Tensor, span: int, window: int | None) -> torch.Tensor:
    """True where a query may look.

    Args:
        query_positions: [batch, num_queries]; positions of the queries in their sequences.
        lengths: [batch, 1]; keys at or after it do not exist.
        span: number of key positions.
        window: how many positions back a query sees, itself included; None sees all.
    """
    key_positions = torch.arange(span)
    behind = query_positions[..., None] - key_positions  # [batch, num_queries, span]
    seen = (behind >= 0) & (key_positions < lengths[..., None])
    if window is not None:
        seen &= behind < window
    return seen[:, None]  # [batch, 1 (heads), num_queries, span]


class _Gather:
    """The keys and values of some sequences, padded to the longest: [batch, span, num_kv_heads, head_dim].

    Padding repeats a sequence's own first block, and what lies past a context's end is zeroed: a block may hold
    anything there (0 * NaN is NaN, masked or not).
    """

    def __init__(self, cache: KVTensors, block_tables: Sequence[tuple[int, ...]], lengths: Sequence[int]) -> None:
        self._cache = cache
        block_size = cache.layout.block_size
        self.span = max(lengths)
        width = -(-self.span // block_size)
        table = np.empty((len(lengths), width), dtype=np.int64)
        for row, blocks, length in zip(table, block_tables, lengths, strict=True):
            used = -(-length // block_size)
            row[:used] = blocks[:used]
            row[used:] = blocks[0]
        self._blocks = torch.from_numpy(table.reshape(-1))
        self._shape = (len(lengths), width * block_size)
        past_end = np.arange(self._shape[1])[None] >= np.asarray(lengths)[:, None]
        past_end[:, self.span :] = False  # sliced off anyway
        self._past_end = torch.from_numpy(np.flatnonzero(past_end))
        self._rooms: tuple[torch.Tensor, torch.Tensor] | None = None

    def read(self, layer: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of `dtype`, both [batch, num_kv_heads, span, head_dim]; valid until the next call."""
        if self._rooms is None:
            self._rooms = (self._cache.room(self._blocks.numel()), self._cache.room(self._blocks.numel()))
        return self._half(layer, 0, self._rooms[0], dtype), self._half(layer, 1, self._rooms[1], dtype)

    def _half(self, layer: int, half: int, room: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        tokens = self._cache.read(layer, half, self._blocks, past_end=self._past_end, room=room).to(dtype)
        return tokens.view(*self._shape, *tokens.shape[1:])[:, : self.span].transpose(1, 2)


class _Decodes:
    """All sequences of a step that compute one token: one padded gather, one attention call."""

    def __init__(self, tokens: Sequence[int], gather: _Gather, lengths: Sequence[int]) -> None:
        self.tokens = torch.tensor(tokens)
        self._gather = gather
        self._lengths = torch.tensor(lengths)[:, None]
        self._uniform = min(lengths) == max(lengths)
        self._masks: dict[int | None, torch.Tensor | None] = {}

    def attend(self, layer: int, query: torch.Tensor, scale: float | None, window: int | None) -> torch.Tensor:
        """`query` and the result [num_tokens, num_heads, head_dim]."""
        keys, values = self._gather.read(layer, query.dtype)
        num_tokens, num_heads, head_dim = query.shape
        # The query heads of one KV head become rows of one query: no KV head is repeated.
        grouped = query.reshape(num_tokens, keys.shape[1], -1, head_dim)
        found = scaled_dot_product_attention(grouped, keys, values, attn_mask=self._mask_for(window), scale=scale)
        return found.reshape(num_tokens, num_heads, head_dim)

    def _mask_for(self, window: int | None) -> torch.Tensor | None:
        if window not in self._masks:
            needed = not self._uniform or (window is not None and self._gather.span > window)
            self._masks[window] = _mask(self._lengths - 1, self._lengths, self._gather.span, window) if needed else None
        return self._masks[window]


class _Prefill:
    """One sequence that computes several tokens: [first_token, first_token + num_tokens) of the step."""

    def __init__(self, first_token: int, num_tokens: int, length: int, gather: _Gather | None) -> None:
        self.tokens = slice(first_token, first_token + num_tokens)
        self._num_tokens = num_tokens
        self._length = length
        self._gather = gather  # None: the whole context is in this step
        self._masks: dict[int | None, torch.Tensor | None] = {}

    def attend(
        self,
        layer: int,
        new: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        scale: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """`new`: query, keys, values [num_tokens, heads, head_dim]; the result is shaped as the query."""
        query, keys, values = (tensor.transpose(0, 1)[None] for tensor in new)
        if self._gather is not None:
            keys, values = self._gather.read(layer, query.dtype)
        mask = self._mask_for(window)
        found = scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
        return found[0].transpose(0, 1)

    def _mask_for(self, window: int | None) -> torch.Tensor | None:
        if window not in self._masks:
            plain = self._gather is None and (window is None or self._length <= window)
            positions = torch.arange(self._length - self._num_tokens, self._length)[None]
            self._masks[window] = (
                None if plain else _mask(positions, torch.tensor([[self._length]]), self._length, window)
            )
        return self._masks[window]


class AttentionContext:
    """What every layer of one forward pass shares: where to write, whom to read.

    Args:
        first_layer: of the model, that is the first in the cache.
    """

    def __init__(
        self, batch: PackedBatch, cache: KVCache, windows: Sequence[int | None], *, first_layer: int = 0
    ) -> None:
        self.cache = KVTensors(cache)
        self.first_layer = first_layer
        self.windows = windows
        self.places = self.cache.places(torch.from_numpy(batch.slots))
        starts, lengths, tables = batch.query_starts, batch.context_lengths, batch.block_tables
        counts = np.diff(starts)
        singles = np.flatnonzero(counts == 1).tolist()
        self.decodes = self._decodes(singles, starts, lengths, tables) if singles else None
        self.only_decodes = len(singles) == len(lengths)
        self.prefills = [
            self._prefill(starts[index], int(counts[index]), lengths[index], tables[index])
            for index in np.flatnonzero(counts > 1).tolist()
        ]

    def _decodes(
        self, singles: list[int], starts: Sequence[int], lengths: Sequence[int], tables: Sequence[tuple[int, ...]]
    ) -> _Decodes:
        own_lengths = [lengths[index] for index in singles]
        gather = _Gather(self.cache, [tables[index] for index in singles], own_lengths)
        return _Decodes([starts[index] for index in singles], gather, own_lengths)

    def _prefill(self, first_token: int, num_tokens: int, length: int, table: tuple[int, ...]) -> _Prefill:
        gather = None if num_tokens == length else _Gather(self.cache, [table], [length])
        return _Prefill(first_token, num_tokens, length, gather)


def attend(
    context: AttentionContext,
    layer: int,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float | None,
) -> torch.Tensor:
    """Write everything, then attend: a sequence may read blocks that another one of this step has just written.

    New keys and values count as the cache holds them, so that a prompt's chunks do not show in the result.

    Args:
        query: [num_tokens, num_heads, head_dim], as is the result.
        keys, values: [num_tokens, num_kv_heads, head_dim], rotated already.
        scale: of the logits; None is 1 / sqrt(head_dim).
    """
    keys, values = context.cache.write(layer, keys, values, context.places)
    window = context.windows[layer]
    if context.only_decodes:
        assert context.decodes is not None
        return context.decodes.attend(layer, query, scale, window)
    found = torch.empty_like(query, memory_format=torch.contiguous_format)
    for prefill in context.prefills:
        own = prefill.tokens
        found[own] = prefill.attend(layer, (query[own], keys[own], values[own]), scale, window)
    if context.decodes is not None:
        tokens = context.decodes.tokens
        found[tokens] = context.decodes.attend(layer, query[tokens], scale, window)
    return found


# --- the seam with transformers -------------------------------------------------------------------

_current: ContextVar[AttentionContext | None] = ContextVar("shuteye_attention", default=None)


@contextmanager
def attending(context: AttentionContext) -> Iterator[None]:
    """Make `context` the one that attention uses. Not to be nested: a forward pass runs no other inside."""
    assert _current.get() is None, "a forward pass is running already"
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it.

    `query` is [1, num_heads, num_tokens, head_dim], the result [1, num_tokens, num_heads, head_dim].
    `sliding_window` is honoured through the context: support.py found each layer's window by asking the model's masks.

    Raises:
        UnsupportedModel: an argument is set that is not honoured.
    """
    context = _current.get()
    assert context is not None, "paged attention needs `attending(context)` around the forward pass"
    if attention_mask is not None or dropout or is_causal is False:
        check_arguments({"attention_mask": attention_mask is not None, "dropout": dropout, "non_causal": not is_causal})
    check_arguments(others)
    layer = cast(int, module.layer_idx) - context.first_layer
    assert sliding_window is None or context.windows[layer] == sliding_window
    new = (each[0].transpose(0, 1) for each in (query, key, value))
    return attend(context, layer, *new, scale=scaling)[None], None


def register() -> None:
    """Make `IMPLEMENTATION` known to transformers. No mask function: models then build no mask."""
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, paged_attention)
