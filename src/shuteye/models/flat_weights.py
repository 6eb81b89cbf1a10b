"""The weights of a Llama-like decoder, or of a rank's part of one, where they lie: matrices and norms by address."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from shuteye.matrices.matrix import Matrix
from shuteye.memory.arena import Arena
from shuteye.memory.layout import Slot
from shuteye.native import LayerSpec
from shuteye.parallel.shards import EMBEDDING, ShardPlan

_EMBEDDING, _NORM, _HEAD = EMBEDDING.removesuffix(".weight"), "model.norm.weight", "lm_head"


@dataclass(frozen=True, slots=True)
class FlatWeights:
    """What the loops compute with: valid while the arena is resident.

    Attributes:
        dtype: what is computed in.
        embedding: of the whole vocabulary; None where steps begin with hidden states.
        final_norm, head: None where steps end with hidden states; of a rank, the head has its rows of the vocabulary.
        memory: the arena, so that its addresses are not given to somebody else.
    """

    dtype: str
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    embedding: Matrix | None
    final_norm: int | None
    head: Matrix | None
    memory: memoryview

    @classmethod
    def of_model(
        cls, slots: Mapping[str, Slot], arena: Arena, windows: Iterable[int | None], *, num_layers: int
    ) -> FlatWeights:
        """A whole model's.

        Args:
            slots: by checkpoint name, tied names included.
            windows: per layer, how many positions back a token sees, itself included; None sees all.
        """
        named = _Named(slots, arena)
        return named.weights(
            named.layers(range(num_layers), windows),
            embedding=named.matrix(_EMBEDDING),
            final_norm=named.address(_NORM),
            head=named.matrix(_HEAD),
        )

    @classmethod
    def of_rank(
        cls, slots: Mapping[str, Slot], arena: Arena, windows: Iterable[int | None], plan: ShardPlan
    ) -> FlatWeights:
        """A rank's part; see `of_model`. Windows are those of its layers."""
        named = _Named(slots, arena)
        return named.weights(
            named.layers(plan.spec.layers, windows),
            embedding=named.matrix(_EMBEDDING) if plan.embeds else None,
            final_norm=named.address(_NORM) if plan.has_head else None,
            head=named.rank_head(plan) if plan.has_head else None,
        )


class _Named:
    """Addresses and matrices by checkpoint name."""

    def __init__(self, slots: Mapping[str, Slot], arena: Arena) -> None:
        self._slots = slots
        self._base = arena.address
        self._memory = arena.bytes_view(0, arena.nbytes)

    def weights(
        self,
        layers: tuple[LayerSpec, ...],
        *,
        embedding: Matrix | None,
        final_norm: int | None,
        head: Matrix | None,
    ) -> FlatWeights:
        """All of a part."""
        first = layers[0].query
        return FlatWeights(first.dtype, first.columns, layers, embedding, final_norm, head, self._memory)

    def find(self, name: str) -> int | None:
        """Where a tensor begins, if there is one of that name."""
        slot = self._slots.get(name)
        return None if slot is None else self._base + slot.offset

    def address(self, name: str) -> int:
        """Where a tensor begins."""
        return self._base + self._slots[name].offset

    def matrix(self, name: str) -> Matrix:
        """A matrix with its bias, if it has one."""
        slot = self._slots[f"{name}.weight"]
        rows, columns = slot.shape
        bias = self.find(f"{name}.bias") or 0
        return Matrix(slot.matrix_kind, rows, columns, slot.dtype, self._base + slot.offset, bias)

    def rank_head(self, plan: ShardPlan) -> Matrix:
        """The rank's rows; where they are the embedding's and that is here, of the whole one."""
        head = self.matrix(_HEAD)
        if not (plan.shape.tied and plan.embeds):
            return head
        return head.part(plan.vocabulary.start, plan.vocabulary.stop)

    def layers(self, indices: range, windows: Iterable[int | None]) -> tuple[LayerSpec, ...]:
        """Some layers, of which `windows` tells in the same order."""
        pairs = zip(indices, windows, strict=True)
        return tuple(self._layer(f"model.layers.{index}", window) for index, window in pairs)

    def _layer(self, prefix: str, window: int | None) -> LayerSpec:
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        return LayerSpec(
            input_norm=self.address(f"{prefix}.input_layernorm.weight"),
            query=self.matrix(f"{attention}.q_proj"),
            key=self.matrix(f"{attention}.k_proj"),
            value=self.matrix(f"{attention}.v_proj"),
            query_norm=self.find(f"{attention}.q_norm.weight"),
            key_norm=self.find(f"{attention}.k_norm.weight"),
            output=self.matrix(f"{attention}.o_proj"),
            post_norm=self.address(f"{prefix}.post_attention_layernorm.weight"),
            gate=self.matrix(f"{mlp}.gate_proj"),
            up=self.matrix(f"{mlp}.up_proj"),
            down=self.matrix(f"{mlp}.down_proj"),
            window=window,
        )
