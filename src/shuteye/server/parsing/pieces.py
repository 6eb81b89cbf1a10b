"""What a model's output consists of, piece by piece, and the base of what parses it.

Knows nothing of formats, nor of how an answer shows them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the caller."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that the model wrote to itself."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A tool call whose name is known; the first has index 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the arguments, which are JSON text, of the call begun last."""

    index: int
    text: str


Piece = Content | Reasoning | CallBegin | CallArguments


class OutputParser:
    """Text in, pieces out; together they are the same however the text was cut. This one takes all for content."""

    def feed(self, text: str) -> list[Piece]:
        """Pieces that are certain after this text."""
        return [Content(text)] if text else []

    def finish(self) -> list[Piece]:
        """The pieces of what was held back; nothing may be fed after that."""
        return []


def held_length(text: str, marker: str) -> int:
    """Length of the longest end of `text` with which `marker` may begin."""
    longest = min(len(marker) - 1, len(text))
    return next((length for length in range(longest, 0, -1) if marker.startswith(text[-length:])), 0)
