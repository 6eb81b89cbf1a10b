"""Parses the answers to one request: reasoning between `<think>` and `</think>` first, then tool calls or plain text.

Knows nothing of how an answer shows what was found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from shuteye.server.parsing.pieces import OutputParser, Piece, Reasoning, held_length
from shuteye.server.parsing.tool_formats import MARKERS, ToolFormat, tool_parser

if TYPE_CHECKING:
    from shuteye.tokenizer import Tokenizer

BEGIN, END = "<think>", "</think>"

ReasoningParserName = Literal["none", "deepseek_r1", "qwen3"]
"""`deepseek_r1` takes everything up to `</think>` for reasoning, `qwen3` only what `<think>` opens."""


@dataclass(frozen=True, slots=True)
class ReadingPlan:
    """How the answers to one request are parsed.

    Attributes:
        tools: how the model writes tool calls; None if it may make none.
        reasons: the model may write reasoning first.
        begins_inside: its first word is reasoning already.
    """

    tools: ToolFormat | None = None
    reasons: bool = False
    begins_inside: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether everything is content."""
        return self.tools is None and not self.reasons

    def reader(self) -> OutputParser:
        """A parser of one answer."""
        rest = OutputParser() if self.tools is None else tool_parser(self.tools)
        return ReasoningParser(rest, inside=self.begins_inside) if self.reasons else rest

    def needs_special_tokens(self, tokenizer: Tokenizer) -> bool:
        """Whether what must be seen to read an answer is special to the tokenizer, which leaves such tokens out."""
        markers = (*((BEGIN, END) if self.reasons else ()), *(MARKERS[self.tools] if self.tools else ()))
        ids = [tokenizer.token_to_id(marker) for marker in markers]
        return any(token_id is not None and tokenizer.is_special(token_id) for token_id in ids)


def begins_inside(parser: ReasoningParserName, prompt: str | None) -> bool:
    """Whether the model's first word is reasoning already: the template may have opened, or closed, it.

    Args:
        prompt: the rendered prompt, if it is known.
    """
    end = (prompt or "").rstrip()
    if end.endswith(BEGIN):
        return True
    return parser == "deepseek_r1" and not end.endswith(END)


class ReasoningParser(OutputParser):
    """Tells reasoning from what follows it.

    Args:
        inside: the first text is reasoning, whether or not `<think>` opens it.
        rest: parses what comes after the reasoning, or all if there is none.
    """

    def __init__(self, rest: OutputParser, *, inside: bool) -> None:
        self._rest = rest
        self._state: Literal["before", "inside", "after"] = "before"
        self._must_open = not inside
        self._held = ""

    def feed(self, text: str) -> list[Piece]:
        """Reasoning as far as it goes, then what `rest` makes of the text."""
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
        """What may have been the beginning of a marker was none."""
        held, self._held = self._held, ""
        if not held:
            return self._rest.finish()
        if self._state == "before" and self._must_open:
            return [*self._rest.feed(held), *self._rest.finish()]
        return [*_reasoning(held), *self._rest.finish()]


def _reasoning(text: str) -> list[Piece]:
    return [Reasoning(text)] if text else []
