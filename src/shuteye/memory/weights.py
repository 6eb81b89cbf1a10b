"""Where the weights are and what would bring each extent back: the moves between such states, as pure data.

Knows nothing of how memory is mapped; `residency.py` carries the moves out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from shuteye.errors import TransitionConflict
from shuteye.memory.image import WeightImage
from shuteye.state import TagResidency

SourceKind = Literal["image", "saved", "memory"]
"""Of one extent: the image's bytes; a copy in the backing; or memory alone, because no file is mapped there."""

Move = Literal["offload", "discard", "restore", "reload", "blank"]

_ALLOWED_FROM: Mapping[Move, frozenset[TagResidency]] = {
    "offload": frozenset({"resident", "offloaded"}),
    "discard": frozenset({"resident", "offloaded", "discarded", "blank"}),
    "restore": frozenset({"offloaded", "resident"}),
    "reload": frozenset({"resident", "offloaded", "discarded", "blank"}),
    "blank": frozenset({"offloaded", "discarded", "blank"}),
}


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring extents of one source: bytes [offset, offset + nbytes), mapped by one call."""

    kind: SourceKind
    offset: int
    nbytes: int


def _all_extents(image: WeightImage, kind: SourceKind) -> tuple[SourceKind, ...]:
    return (kind,) * len(image.layout.extents)


@dataclass(frozen=True, slots=True)
class WeightsState:
    """One rank's weights.

    `sources` has one entry per extent. While the weights are mapped it is what lies under them, and pages written since
    differ from it; while they are offloaded it is what will bring them back; discarded, it means nothing.
    """

    residency: TagResidency
    image: WeightImage
    sources: tuple[SourceKind, ...]

    @classmethod
    def initial(cls, image: WeightImage) -> WeightsState:
        """Nothing mapped yet: the image will bring back every extent."""
        return cls("offloaded", image, _all_extents(image, "image"))

    @property
    def is_mapped(self) -> bool:
        """Whether the arena's addresses may be touched."""
        return self.residency in ("resident", "blank")

    def require(self, move: Move) -> None:
        """Refuse an illegal move.

        Raises:
            TransitionConflict: the weights are not where the move starts.
        """
        if self.residency not in _ALLOWED_FROM[move]:
            raise TransitionConflict(
                f"Weights that are {self.residency} cannot be moved by {move!r}; "
                f"they must be {' or '.join(sorted(_ALLOWED_FROM[move]))}."
            )

    def offloaded(self, saved: Set[int]) -> WeightsState:
        """Brought back by the backing where an extent's index is in `saved`, else from where it was mapped."""
        sources: tuple[SourceKind, ...] = tuple(
            "saved" if index in saved else kind for index, kind in enumerate(self.sources)
        )
        assert "memory" not in sources, "an extent that no file holds must be saved before it can be offloaded"
        return replace(self, residency="offloaded", sources=sources)

    def discarded(self) -> WeightsState:
        """Nothing brings them back but a reload."""
        return replace(self, residency="discarded")

    def restored(self) -> WeightsState:
        """In memory, each extent from its source."""
        return replace(self, residency="resident")

    def reloaded(self, image: WeightImage) -> WeightsState:
        """In memory, every extent from `image`."""
        return WeightsState("resident", image, _all_extents(image, "image"))

    def blank(self) -> WeightsState:
        """Mapped, and not yet written."""
        return replace(self, residency="blank", sources=_all_extents(self.image, "memory"))

    def runs(self) -> Iterator[Run]:
        """The arena in as few pieces as there are changes of source."""
        pairs = zip(self.sources, self.image.layout.extents, strict=True)
        for kind, group in groupby(pairs, key=lambda pair: pair[0]):
            extents = [extent for _, extent in group]
            yield Run(kind, extents[0].offset, extents[-1].end - extents[0].offset)
