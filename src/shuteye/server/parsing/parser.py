"""Which readers one route's answers go through, in which order.

Knows nothing of requests or of the shape of an answer.
"""

from __future__ import annotations

from dataclasses import dataclass

from shuteye.server.parsing.pieces import OutputParser, PlainReader
from shuteye.server.parsing.reasoning import BEGIN, END, ReasoningReader
from shuteye.server.parsing.tool_formats import MARKERS, ToolFormat, tool_reader
from shuteye.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ReadingPlan:
    """How the answers to one request are read.

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
        """A reader of one answer."""
        rest = PlainReader() if self.tools is None else tool_reader(self.tools)
        return ReasoningReader(rest, inside=self.begins_inside) if self.reasons else rest

    def needs_special_tokens(self, tokenizer: Tokenizer) -> bool:
        """Whether what must be seen to read an answer is special to the tokenizer, which leaves such tokens out."""
        markers = (*((BEGIN, END) if self.reasons else ()), *(MARKERS[self.tools] if self.tools else ()))
        ids = [tokenizer.token_to_id(marker) for marker in markers]
        return any(token_id is not None and tokenizer.is_special(token_id) for token_id in ids)
