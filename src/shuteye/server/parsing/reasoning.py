"""Tells reasoning, written between `<think>` and `</think>`, from what follows it.

Knows nothing of tool calls; what follows is read by another reader.
"""

from __future__ import annotations

from typing import Literal

from shuteye.server.parsing.pieces import OutputParser, Piece, Reasoning, held_length

BEGIN, END = "<think>", "</think>"

ReasoningParserName = Literal["none", "deepseek_r1", "qwen3"]
"""`deepseek_r1` takes everything up to `</think>` for reasoning, `qwen3` only what `<think>` opens."""


def begins_inside(parser: ReasoningParserName, prompt: str | None) -> bool:
    """Whether the model's first word is reasoning already: the template may have opened, or closed, it.

    Args:
        prompt: the rendered prompt, if it is known.
    """
    end = (prompt or "").rstrip()
    if end.endswith(BEGIN):
        return True
    return parser == "deepseek_r1" and not end.endswith(END)


class ReasoningReader:
    """See `OutputParser`.

    Args:
        inside: the first text is reasoning, whether or not `<think>` opens it.
        rest: reads what comes after the reasoning, or all if there is none.
    """

    def __init__(self, rest: OutputParser, *, inside: bool) -> None:
        self._rest = rest
        self._state: Literal["before", "inside", "after"] = "before"
        self._must_open = not inside
        self._held = ""

    def feed(self, text: str) -> list[Piece]:
        """See `OutputParser`."""
        if self._state == "after":
            return self._rest.feed(text)
        text = self._held + text
        self._held = ""
        if self._state == "before":
            opened = text.lstrip()
            if opened.startswith(BEGIN):
                text = opened[len(BEGIN) :]
            elif BEGIN.startswith(opened):
                self._held = text
                return []
            elif self._must_open:
                self._state = "after"
                return self._rest.feed(text)
            self._state = "inside"
        return self._inside(text)

    def _inside(self, text: str) -> list[Piece]:
        thought, end, rest = text.partition(END)
        if end:
            self._state = "after"
            return [*_reasoning(thought), *(self._rest.feed(rest) if rest else [])]
        shown = len(text) - held_length(text, END)
        self._held = text[shown:]
        return _reasoning(text[:shown])

    def finish(self) -> list[Piece]:
        """See `OutputParser`."""
        held, self._held = self._held, ""
        if not held:
            return self._rest.finish()
        if self._state == "before" and self._must_open:
            return [*self._rest.feed(held), *self._rest.finish()]
        return [*_reasoning(held), *self._rest.finish()]


def _reasoning(text: str) -> list[Piece]:
    return [Reasoning(text)] if text else []
