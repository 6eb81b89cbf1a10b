"""Which part of a model each rank holds: layers by stage, heads by KV group, MLP and vocabulary by rows. Pure.

Knows nothing of torch, files or processes. Names and shapes are the unsharded checkpoint's.

Ranks are numbered stage by stage: rank = pp_rank * tp_size + tp_rank. Within a stage, every rank holds a contiguous
range of each split dimension, in rank order, so that parts side by side are the whole again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NoReturn, Protocol

from shuteye.errors import InvalidRequest, UnsupportedModel

ROW_MULTIPLE = 32
"""Rows of MLP and vocabulary are cut at multiples of this where there are enough: what the native kernels compute
together (two tiles of 16 rows, or one step of 32 in depth), and 64 bytes of bfloat16."""

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

Part = tuple[slice | list[int], ...]
"""Of a tensor, per dimension a slice, or the indices where the part is not in one piece."""


def part_shape(part: Part, shape: Sequence[int]) -> tuple[int, ...]:
    """What is left of a tensor of `shape`."""
    return tuple(
        len(range(*each.indices(size)) if isinstance(each, slice) else each)
        for each, size in zip(part, shape, strict=True)
    )


@dataclass(frozen=True, slots=True)
class RankPlace:
    """One of `tp_size * pp_size` ranks, whatever the model."""

    rank: int = 0
    tp_size: int = 1
    pp_size: int = 1

    @property
    def num_ranks(self) -> int:
        """Of the whole model."""
        return self.tp_size * self.pp_size

    @property
    def tp_rank(self) -> int:
        """Place within the stage."""
        return self.rank % self.tp_size

    @property
    def pp_rank(self) -> int:
        """Which stage."""
        return self.rank // self.tp_size

    @property
    def label(self) -> str:
        """`tp0of2.pp0of1`; empty for a single rank."""
        if self.num_ranks == 1:
            return ""
        return f"tp{self.tp_rank}of{self.tp_size}.pp{self.pp_rank}of{self.pp_size}"

    def all(self) -> tuple[RankPlace, ...]:
        """Every rank beside which this one works, itself included, by rank."""
        return tuple(replace(self, rank=rank) for rank in range(self.num_ranks))


ONE_RANK = RankPlace()
"""Alone with the whole model."""


@dataclass(frozen=True, slots=True)
class RankSpec:
    """One rank's share.

    Attributes:
        layers, kv_groups: that it computes; a KV group is a KV head with the query heads that read it.
        epoch: of the group; raised whenever ranks are started again.
    """

    rank: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    layers: range
    kv_groups: range
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """The sizes of a Llama-like decoder.

    Attributes:
        tied: the head's rows are the embedding's.
        mlp_multiple: the MLP is cut at multiples of it where there are enough: where blocks of quantized columns end.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    tied: bool
    mlp_multiple: int = ROW_MULTIPLE

    @property
    def layer_numel(self) -> int:
        """Numbers in one layer's matrices."""
        heads = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        return (heads + 3 * self.intermediate_size) * self.hidden_size

    @property
    def embedding_numel(self) -> int:
        """Numbers in the embedding, and as many in the head."""
        return self.vocab_size * self.hidden_size


def even_ranges(total: int, num_parts: int, *, multiple: int = 1) -> tuple[range, ...]:
    """[0, total) in contiguous parts as equal as can be, the larger ones first.

    They are cut at multiples of `multiple`, or of its half, quarter, … if a part would be empty.
    """
    assert 0 < num_parts <= total, f"{total} cannot be cut into {num_parts} parts"
    while -(-total // multiple) < num_parts:
        multiple //= 2
    num_units = -(-total // multiple)
    least, num_larger = divmod(num_units, num_parts)
    ends = [0]
    for index in range(num_parts):
        ends.append(ends[-1] + (least + (index < num_larger)) * multiple)
    ends[-1] = total  # the last unit may be short
    return tuple(range(begin, end) for begin, end in pairwise(ends))


class StageSizes(Protocol):
    """What stages are made equal by."""

    @property
    def num_layers(self) -> int:
        """Of the whole model."""

    @property
    def tied(self) -> bool:
        """The head's rows are the embedding's."""

    @property
    def layer_numel(self) -> int:
        """Numbers in one layer's matrices."""

    @property
    def embedding_numel(self) -> int:
        """Numbers in the embedding, and as many in the head."""


def stage_layers(shape: StageSizes, *, tp_size: int, pp_size: int) -> tuple[range, ...]:
    """The layers of each stage, so that the largest rank has as few bytes as possible.

    The first stage has the embedding beside its layers, whole on every rank; the last a rank's share of the head.
    """
    head = 0 if shape.tied and pp_size == 1 else -(-shape.embedding_numel // tp_size)
    layer = -(-shape.layer_numel // tp_size)
    beside = [0] * pp_size
    beside[0] += shape.embedding_numel
    beside[-1] += head
    counts = [1] * pp_size
    for _ in range(shape.num_layers - pp_size):
        smallest = min(range(pp_size), key=lambda stage: beside[stage] + counts[stage] * layer)
        counts[smallest] += 1
    ends = [sum(counts[:stage]) for stage in range(pp_size + 1)]
    return tuple(range(begin, end) for begin, end in pairwise(ends))


def plan_shards(shape: DecoderShape, place: RankPlace, *, epoch: int = 0) -> ShardPlan:
    """The part of `place` in a model of `shape`.

    Raises:
        UnsupportedModel: more tensor parallel ranks than KV groups, or MLP or vocabulary rows; more stages than layers.
    """
    _refuse_too_many(shape, place)
    layers = stage_layers(shape, tp_size=place.tp_size, pp_size=place.pp_size)[place.pp_rank]
    kv_groups = even_ranges(shape.num_kv_heads, place.tp_size)[place.tp_rank]
    return ShardPlan(
        shape,
        RankSpec(
            rank=place.rank,
            tp_rank=place.tp_rank,
            tp_size=place.tp_size,
            pp_rank=place.pp_rank,
            pp_size=place.pp_size,
            layers=layers,
            kv_groups=kv_groups,
            epoch=epoch,
        ),
    )


def _refuse_too_many(shape: DecoderShape, place: RankPlace) -> None:
    if shape.num_heads % shape.num_kv_heads:
        raise UnsupportedModel(f"{shape.num_heads} query heads do not form groups on {shape.num_kv_heads} KV heads.")
    for count, what in (
        (shape.num_kv_heads, "KV heads, by which attention is split"),
        (shape.intermediate_size, "rows in its MLP"),
        (shape.vocab_size, "tokens in its vocabulary"),
    ):
        refuse_more_ranks_than(count, what, place)
    refuse_more_stages_than_layers(place, shape.num_layers)


def refuse_more_ranks_than(count: int, what: str, place: RankPlace) -> None:
    """Every rank of a stage has at least one of what is split.

    Raises:
        UnsupportedModel: there are not enough of them.
    """
    if place.tp_size > count:
        raise UnsupportedModel(
            f"tensor_parallel_size is {place.tp_size}, and the model has {count} {what}; use at most {count}.",
            param="tensor_parallel_size",
        )


def refuse_more_stages_than_layers(place: RankPlace, num_layers: int) -> None:
    """Every stage has at least one layer.

    Raises:
        UnsupportedModel: there are not enough of them.
    """
    if place.pp_size > num_layers:
        raise UnsupportedModel(
            f"pipeline_parallel_size is {place.pp_size}, and the model has {num_layers} layers; use at most "
            f"{num_layers}.",
            param="pipeline_parallel_size",
        )


_DIMENSIONS: Mapping[str, tuple[str, ...]] = {
    # a layer's tensor → what its dimensions count; one that counts nothing split is the same on every rank
    "self_attn.q_proj.weight": ("query", "hidden"),
    "self_attn.k_proj.weight": ("key", "hidden"),
    "self_attn.v_proj.weight": ("key", "hidden"),
    "self_attn.o_proj.weight": ("hidden", "query"),
    "mlp.gate_proj.weight": ("intermediate", "hidden"),
    "mlp.up_proj.weight": ("intermediate", "hidden"),
    "mlp.down_proj.weight": ("hidden", "intermediate"),
    "self_attn.q_proj.bias": ("query",),
    "self_attn.k_proj.bias": ("key",),
    "self_attn.v_proj.bias": ("key",),
    "self_attn.o_proj.bias": ("hidden",),
    "mlp.gate_proj.bias": ("intermediate",),
    "mlp.up_proj.bias": ("intermediate",),
    "mlp.down_proj.bias": ("hidden",),
    "self_attn.q_norm.weight": ("head",),
    "self_attn.k_norm.weight": ("head",),
    "input_layernorm.weight": ("hidden",),
    "post_attention_layernorm.weight": ("hidden",),
}
_LAST_DIMENSIONS: Mapping[str, tuple[str, ...]] = {
    # of the tensors after the last layer
    "model.norm.weight": ("hidden",),
    HEAD: ("vocabulary", "hidden"),
    "lm_head.bias": ("vocabulary",),
}
_ADDED_ONCE = frozenset({"self_attn.o_proj.bias", "mlp.down_proj.bias"})
"""Biases of products that are summed over ranks: only TP rank 0 has them."""

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


class RankPlan:
    """What one rank has to do, however the model is split."""

    __slots__ = ()
    spec: RankSpec

    @property
    def embeds(self) -> bool:
        """Whether it begins with token ids; others begin with the hidden states of the stage before."""
        return self.spec.pp_rank == 0

    @property
    def has_head(self) -> bool:
        """Whether it computes logits: those of its own rows of the vocabulary."""
        return self.spec.pp_rank == self.spec.pp_size - 1

    @property
    def holds_sampler(self) -> bool:
        """Whether the logits of the whole vocabulary end here: TP rank 0 of the last stage."""
        return self.has_head and self.spec.tp_rank == 0

    @property
    def vocab_size(self) -> int:
        """Tokens of the whole model."""
        raise NotImplementedError

    @property
    def vocabularies(self) -> tuple[range, ...]:
        """The tokens whose logits each rank of the last stage computes, by tp_rank."""
        return even_ranges(self.vocab_size, self.spec.tp_size, multiple=ROW_MULTIPLE)

    @property
    def vocabulary(self) -> range:
        """Those of this rank, if it has a head."""
        return self.vocabularies[self.spec.tp_rank]

    def shares_rows(self, name: str) -> bool:
        """Whether a tensor is an embedding of which the rank's part of the vocabulary is its head as well."""
        raise NotImplementedError

    def part_of(self, name: str, shape: Sequence[int]) -> Part | None:
        """The rank's part of the checkpoint's tensor `name`; None if it holds nothing of it.

        Args:
            shape: the whole tensor's.

        Raises:
            InvalidRequest: the model has no tensor of that name, or of another shape.
        """
        raise NotImplementedError


def refuse_name(name: str) -> NoReturn:
    """Say that the model has no such tensor."""
    raise InvalidRequest(f"{name!r} is not a tensor of this model.", param=name)


def require_shape(name: str, shape: Sequence[int], expected: Sequence[int]) -> None:
    """Refuse a tensor of another shape.

    Raises:
        InvalidRequest: says both.
    """
    if tuple(shape) != tuple(expected):
        raise InvalidRequest(f"{name!r} has shape {tuple(shape)}, expected {tuple(expected)}.", param=name)


@dataclass(frozen=True, slots=True)
class ShardPlan(RankPlan):
    """One rank's part of each tensor of a Llama-like decoder."""

    shape: DecoderShape
    spec: RankSpec

    # --- what the rank has to do --------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Tokens of the whole model."""
        return self.shape.vocab_size

    @property
    def num_heads(self) -> int:
        """Query heads of this rank."""
        return len(self.spec.kv_groups) * self.shape.num_heads // self.shape.num_kv_heads

    @property
    def intermediate(self) -> range:
        """Its rows of gate and up, which are its columns of down."""
        shape = self.shape
        return even_ranges(shape.intermediate_size, self.spec.tp_size, multiple=shape.mlp_multiple)[self.spec.tp_rank]

    def kv_bytes_per_token(self, *, itemsize: int) -> int:
        """Bytes of one token's keys and values on this rank; others may have more or fewer."""
        return 2 * len(self.spec.layers) * len(self.spec.kv_groups) * self.shape.head_dim * itemsize

    # --- tensors ------------------------------------------------------------------------------------

    def shares_rows(self, name: str) -> bool:
        """See `RankPlan.shares_rows`."""
        return name == EMBEDDING and self.embeds and self.has_head and self.shape.tied

    def part_of(self, name: str, shape: Sequence[int]) -> Part | None:
        """See `RankPlan.part_of`."""
        match = _LAYER.fullmatch(name)
        if match and int(match[1]) < self.shape.num_layers:
            dimensions, mine = _DIMENSIONS.get(match[2]), self._has_in_layer(int(match[1]), match[2])
        elif name == EMBEDDING or (name == HEAD and self.shape.tied):
            dimensions = ("token" if self.embeds else "vocabulary", "hidden")
            mine = self.embeds or (self.has_head and self.shape.tied)
        else:
            dimensions, mine = _LAST_DIMENSIONS.get(name), self.has_head
        if dimensions is None:
            refuse_name(name)
        full = self._full_sizes()
        require_shape(name, shape, [full[dimension] for dimension in dimensions])
        return self._slices(dimensions) if mine else None

    def _has_in_layer(self, layer: int, leaf: str) -> bool:
        return layer in self.spec.layers and (self.spec.tp_rank == 0 or leaf not in _ADDED_ONCE)

    def _full_sizes(self) -> dict[str, int]:
        shape = self.shape
        return {
            "query": shape.num_heads * shape.head_dim,
            "key": shape.num_kv_heads * shape.head_dim,
            "head": shape.head_dim,
            "hidden": shape.hidden_size,
            "intermediate": shape.intermediate_size,
            "token": shape.vocab_size,
            "vocabulary": shape.vocab_size,
        }

    def _slices(self, dimensions: tuple[str, ...]) -> Part:
        groups = self.spec.kv_groups
        key_rows = range(groups.start * self.shape.head_dim, groups.stop * self.shape.head_dim)
        group_size = self.shape.num_heads // self.shape.num_kv_heads
        split = {
            "query": range(key_rows.start * group_size, key_rows.stop * group_size),
            "key": key_rows,
            "intermediate": self.intermediate,
            "vocabulary": self.vocabulary,
        }
        full = self._full_sizes()
        ranges = (split.get(dimension, range(full[dimension])) for dimension in dimensions)
        return tuple(slice(part.start, part.stop) for part in ranges)
