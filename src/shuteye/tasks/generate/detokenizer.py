"""The text of one sequence as it grows, cut at a stop string.

Knows nothing of requests or scheduling; which tokens end a sequence is decided before they come here.
"""

from __future__ import annotations

from collections.abc import Sequence

from shuteye.tokenizer import DecodeStream


class Detokenizer:
    """Token ids in, text out; text that may be the beginning of a stop string is held back.

        text   [0 ........ shown) [...... held ......)
                returned already    decoded; a proper prefix of some stop string

    As a match that ends in new text begins in the held text, only held and new text are ever searched. Of several
    matches the one that ends first counts, and of those the longest, so that the outcome does not depend on how the
    text was split into tokens.

    Args:
        stream: decodes this sequence and no other.
        min_tokens: a stop string counts only if it ends in the text of a later token than this many.
    """

    def __init__(
        self,
        stream: DecodeStream,
        *,
        stop_strings: Sequence[str] = (),
        include_stop_string: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._stream = stream
        self._stop_strings = tuple(stop_strings)
        self._include_stop_string = include_stop_string
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._held = ""
        self._stop_string: str | None = None

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text, if one did; nothing may be fed after that."""
        return self._stop_string

    def feed(self, token_id: int) -> str:
        """Take one token; the text it releases, possibly empty."""
        assert self._stop_string is None, "feed() after a stop string ended the text"
        self._num_tokens += 1
        return self._release(self._stream.step(token_id) or "")

    def finish(self) -> str:
        """The text still held back, an incomplete character as U+FFFD; empty if a stop string ended the text."""
        if self._stop_string is not None:
            return ""
        text = self._release(self._stream.flush()) + self._held
        self._held = ""
        return text

    def _release(self, new: str) -> str:
        if not self._stop_strings:
            return new
        text = self._held + new
        match = self._first_match(text, after=len(self._held)) if self._num_tokens > self._min_tokens else None
        if match is None:
            shown = len(text) - self._num_to_hold(text)
            self._held = text[shown:]
            return text[:shown]
        start, self._stop_string = match
        self._held = ""
        return text[: start + len(self._stop_string)] if self._include_stop_string else text[:start]

    def _first_match(self, text: str, *, after: int) -> tuple[int, str] | None:
        """Start of, and which stop string: the match that ends first, of those that end beyond `after`."""
        matches = []
        for stop in self._stop_strings:
            start = text.find(stop, max(0, after + 1 - len(stop)))
            if start >= 0:
                matches.append((start + len(stop), start, stop))
        return min(matches)[1:] if matches else None

    def _num_to_hold(self, text: str) -> int:
        """Length of the longest end of the text with which some stop string begins, short of the whole string."""
        longest = max(map(len, self._stop_strings)) - 1
        for length in range(min(longest, len(text)), 0, -1):
            tail = text[-length:]
            if any(len(stop) > length and stop.startswith(tail) for stop in self._stop_strings):
                return length
        return 0
