"""Whether the memory under mapped weights is still theirs, although others may write to the image's file.

Knows nothing of what to do where it is not.
"""

from __future__ import annotations

from shuteye.errors import ImageFailure
from shuteye.memory.arena import Arena
from shuteye.memory.weights_state import WeightsState


class ImageWatch:
    """Over the weights of an arena, from one mapping of them to the next.

    A file that is cut short takes along the pages written over it, even if it is as it was a moment later (`cp` of the
    very same bytes begins so). So how much was written is remembered, and what was found wrong once stays wrong.
    """

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._written_bytes = 0
        self._spoilt: str | None = None

    def mapped_anew(self) -> None:
        """Whatever was mapped before is gone, and with it what was wrong with it."""
        self._written_bytes, self._spoilt = 0, None

    def note_written(self) -> None:
        """An update has ended: what lies over the image now is to stay there.

        Raises:
            BackendFailure: the kernel would not say which pages were written.
        """
        self._written_bytes = self._count_written()

    def require_intact(self, state: WeightsState) -> None:
        """Refuse to go on with weights under which the image's file was changed, until they are mapped anew.

        Raises:
            ImageFailure: see `WeightImage.require_intact`; or updates are lost.
            BackendFailure: the kernel would not say which pages were written.
        """
        if not state.is_mapped or "image" not in state.sources:
            return
        if self._spoilt is None:
            self._spoilt = self._find_damage(state)
        if self._spoilt is not None:
            raise ImageFailure(self._spoilt)

    def is_intact(self, state: WeightsState) -> bool:
        """Whether `require_intact` would let it pass."""
        try:
            self.require_intact(state)
        except ImageFailure:
            return False
        return True

    def _find_damage(self, state: WeightsState) -> str | None:
        try:
            touched = state.image.require_intact()
        except ImageFailure as failure:
            return failure.message
        if touched and self._count_written() < self._written_bytes:
            return (
                f"The weight image {state.image.path} was cut short while in use. It is as it was, but updates written "
                "over it are lost. Wake up to serve the image, and update the weights again."
            )
        return None

    def _count_written(self) -> int:
        return sum(nbytes for _, nbytes in self._arena.written_ranges())
