"""In which numbers the tensors of an arena are held, and how many bits each takes. Read from a layout."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod

from shuteye.memory.layout import Layout

_MAIN_SHARE = 0.02


@dataclass(frozen=True, slots=True)
class Precision:
    """How exact weights are, for people.

    Attributes:
        format: of nearly all numbers, most used first: `bfloat16`, `q4_k and q6_k`.
        bits_per_weight: in memory, scales and the padding of panels included.
    """

    format: str
    bits_per_weight: float

    @classmethod
    def of(cls, layout: Layout) -> Precision:
        """What a layout says of its tensors."""
        counts: Counter[str] = Counter()
        for slot in layout.slots.values():
            counts[slot.kind if slot.matrix_kind.is_quantized else slot.dtype] += prod(slot.shape)
        total = counts.total()
        names = (name for name, count in counts.most_common() if count >= _MAIN_SHARE * total)
        bits = 8 * sum(slot.nbytes for slot in layout.slots.values())
        return cls(" and ".join(names), round(bits / total, 2) if total else 0.0)

    def __str__(self) -> str:
        return f"{self.format} ({self.bits_per_weight:g} bits per weight)"
