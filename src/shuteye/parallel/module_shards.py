"""Which part of a model of any architecture each rank holds, once it is known how its tensors may be cut. Pure.

Knows nothing of torch or transformers: what may be cut, and where, `models/module_split.py` reads there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from shuteye.parallel.shards import (
    ROW_MULTIPLE,
    Part,
    RankPlace,
    RankPlan,
    RankSpec,
    even_ranges,
    refuse_more_ranks_than,
    refuse_more_stages_than_layers,
    refuse_name,
    require_shape,
    stage_layers,
)

Exchange = Literal["sum", "sum_of_slices", "gather"]
"""What ranks do around a module that each has a part of: add up what it gave; the same, having given it their slice of
an input that is whole; put side by side what it gave."""


@dataclass(frozen=True, slots=True)
class TensorSplit:
    """How one tensor of the checkpoint is cut.

    Attributes:
        shape: the whole tensor's.
        layer: that it belongs to; None: to no layer.
        last: of a tensor of no layer, whether it is needed after the layers rather than before them.
        dimension: that is cut; None: it is whole on every rank of its stage.
        multiple: of this it is cut at, where there are enough.
        by_group: which is what belongs to one KV group.
        times: as many tensors lie in it one behind the other, along the dimension, and each is cut.
        once: TP rank 0 alone has it.
    """

    shape: tuple[int, ...]
    layer: int | None = None
    last: bool = False
    dimension: int | None = None
    multiple: int = ROW_MULTIPLE
    by_group: bool = False
    times: int = 1
    once: bool = False

    @property
    def width(self) -> int:
        """Of what is cut."""
        assert self.dimension is not None
        return self.shape[self.dimension] // self.times

    def rows(self, spec: RankSpec) -> range:
        """Of what is cut, that one rank's."""
        return even_ranges(self.width, spec.tp_size, multiple=self.multiple)[spec.tp_rank]

    def part(self, spec: RankSpec) -> Part:
        """The part of one rank of the stage."""
        part: list[slice | list[int]] = [slice(0, size) for size in self.shape]
        if self.dimension is not None:
            rows = self.rows(spec)
            every = [row + index * self.width for index in range(self.times) for row in rows]
            part[self.dimension] = slice(rows.start, rows.stop) if self.times == 1 else every
        return tuple(part)


@dataclass(frozen=True, slots=True)
class ModuleSplit:
    """How a model may be cut.

    Attributes:
        attention: whether attention is split by KV group; if not, every rank of a stage computes all of it.
        layers: the name of the list of layers.
        layer_numel: numbers in one layer, on average.
        embedding, head: names of the tensors that begin and end the model.
        tied: the head's rows are the embedding's.
        after: modules between the layers and the head, which only the last stage has.
        tensors: by checkpoint name, tied ones included; the head's as if it were not tied.
        exchanges: by module name.
    """

    num_layers: int
    num_kv_heads: int
    attention: bool
    hidden_size: int
    vocab_size: int
    layers: str
    layer_numel: int
    embedding: str
    head: str
    tied: bool
    after: tuple[str, ...]
    tensors: Mapping[str, TensorSplit]
    exchanges: Mapping[str, Exchange]

    @property
    def embedding_numel(self) -> int:
        """Numbers in the embedding, and as many in the head."""
        return self.vocab_size * self.hidden_size

    def with_tie(self, tied: bool) -> ModuleSplit:
        """As the checkpoint has it, whatever the config says."""
        return replace(self, tied=tied)

    @property
    def multiple(self) -> int:
        """Where what belongs to no KV group is cut."""
        return max((each.multiple for each in self.tensors.values() if not each.by_group), default=ROW_MULTIPLE)

    def with_multiple(self, multiple: int) -> ModuleSplit:
        """With all of it cut elsewhere, so that what fits together still does."""
        tensors = {
            name: each if each.by_group else replace(each, multiple=multiple) for name, each in self.tensors.items()
        }
        return replace(self, tensors=tensors)

    def with_blocks(self, blocks: Mapping[str, int]) -> ModuleSplit:
        """Cut where blocks of columns end, by tensor; within them where there are too few, or a KV group ends."""
        cut = (blocks[name] for name, each in self.tensors.items() if each.dimension == 1 and name in blocks)
        return self.with_multiple(max((ROW_MULTIPLE, *cut)))


def plan_modules(split: ModuleSplit, place: RankPlace) -> ModulePlan:
    """The part of `place`.

    Raises:
        UnsupportedModel: more tensor parallel ranks than KV groups, or than rows of what else is split; more stages
            than layers.
    """
    if split.attention:
        refuse_more_ranks_than(split.num_kv_heads, "KV heads, by which attention is split", place)
    for name, tensor in split.tensors.items():
        if tensor.dimension is not None:
            refuse_more_ranks_than(tensor.width, f"rows or columns in {name}", place)
    refuse_more_stages_than_layers(place, split.num_layers)
    groups = even_ranges(split.num_kv_heads, place.tp_size) if split.attention else ()
    spec = RankSpec(
        rank=place.rank,
        tp_rank=place.tp_rank,
        tp_size=place.tp_size,
        pp_rank=place.pp_rank,
        pp_size=place.pp_size,
        layers=stage_layers(split, tp_size=place.tp_size, pp_size=place.pp_size)[place.pp_rank],
        kv_groups=groups[place.tp_rank] if groups else range(split.num_kv_heads),
    )
    return ModulePlan(split, spec)


@dataclass(frozen=True, slots=True)
class ModulePlan(RankPlan):
    """One rank's part of each tensor of a model that transformers' modules compute."""

    split: ModuleSplit
    spec: RankSpec

    @property
    def vocab_size(self) -> int:
        """Tokens of the whole model."""
        return self.split.vocab_size

    def part_of(self, name: str, shape: Sequence[int]) -> Part | None:
        """See `RankPlan.part_of`."""
        tensor = self.split.tensors.get(name)
        if tensor is None:
            refuse_name(name)
        require_shape(name, shape, tensor.shape)
        if self.split.tied and name in (self.split.embedding, self.split.head):
            tensor = self.split.tensors[self.split.embedding if self.embeds else self.split.head]
        if not self._has(tensor):
            return None
        return tensor.part(self.spec)

    def shares_rows(self, name: str) -> bool:
        """See `RankPlan.shares_rows`."""
        return name == self.split.embedding and self.embeds and self.has_head and self.split.tied

    def _has(self, tensor: TensorSplit) -> bool:
        if tensor.once and self.spec.tp_rank:
            return False
        if tensor.layer is not None:
            return tensor.layer in self.spec.layers
        return self.has_head if tensor.last else self.embeds

    def has_module(self, name: str) -> bool:
        """Whether a module, or a buffer, is in no layer of another stage."""
        layer = self.layer_of(name)
        return layer is None or layer in self.spec.layers

    def layer_of(self, name: str) -> int | None:
        """The layer that something belongs to."""
        head, _, rest = name.partition(f"{self.split.layers}.")
        return int(rest.partition(".")[0]) if rest and not head else None
