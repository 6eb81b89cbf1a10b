"""Grammars that make a model call a tool, in the words in which its reader expects calls.

Knows nothing of how a grammar is followed. Syntax: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shuteye.request import JSON_WHITESPACE, StructuredOutputsParams
from shuteye.server.protocol.tools import Tool
from shuteye.server.reading.tool_formats import HERMES_BEGIN, HERMES_END, MISTRAL_BEGIN, ToolFormat
from shuteye.tokenizer import Tokenizer

MAX_CALLS = 16
"""Most calls that a model can be made to write in one answer, so that one that repeats itself comes to an end."""


@dataclass(frozen=True, slots=True)
class _Words:
    """What stands around calls: before and after all of them, around and between single ones, and before arguments."""

    opening: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    arguments: str = "arguments"
    after: tuple[str, ...] = ()
    between: str = ""
    closing: tuple[str, ...] = ()


_WORDS: Mapping[ToolFormat, _Words] = {
    "hermes": _Words(before=(HERMES_BEGIN, "\n"), after=("\n", HERMES_END), between="\n"),
    "llama3_json": _Words(arguments="parameters", between="; "),
    "mistral": _Words(opening=(MISTRAL_BEGIN, "["), between=", ", closing=("]",)),
}


def forced_call(
    tools: Sequence[Tool], tool_format: ToolFormat, tokenizer: Tokenizer, *, several: bool
) -> StructuredOutputsParams:
    """Structure of an output that calls one of the tools, or, if `several`, up to MAX_CALLS."""
    words = _WORDS[tool_format]

    def literal(*texts: str) -> str:
        return " ".join(_literal(text, tokenizer) for text in texts)

    more = f"({literal(words.between)} call){{0,{MAX_CALLS - 1}}}" if several else ""
    rules = [
        f"start: {literal(*words.opening)} call {more} {literal(*words.closing)}",
        f"call: {literal(*words.before)} ({' | '.join(f'tool_{index}' for index in range(len(tools)))}) "
        f"{literal(*words.after)}",
    ]
    for index, tool in enumerate(tools):
        head = f'{{"name": {json.dumps(tool.function.name)}, "{words.arguments}": '
        schema = tool.function.schema_of_arguments | {"x-guidance": {"whitespace_pattern": JSON_WHITESPACE}}
        rules += [
            f'tool_{index}: {json.dumps(head)} arguments_{index} "}}"',
            f"arguments_{index}: %json {json.dumps(schema)}",
        ]
    return StructuredOutputsParams(grammar="\n".join(rules), param="tools")


def _literal(text: str, tokenizer: Tokenizer) -> str:
    """A text as it is, or as the special token that it is to this tokenizer."""
    token_id = tokenizer.token_to_id(text)
    return f"<[{token_id}]>" if token_id is not None and tokenizer.is_special(token_id) else json.dumps(text)
