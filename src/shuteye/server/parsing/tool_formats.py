"""The ways in which models write tool calls, parsed as they come: Hermes and Qwen, Llama 3, Mistral.

Knows nothing of which tools there are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Literal

from shuteye.server.parsing.pieces import CallArguments, CallBegin, Content, OutputParser, Piece, held_length

ToolFormat = Literal["hermes", "llama3_json", "mistral"]

HERMES_BEGIN, HERMES_END = "<tool_call>", "</tool_call>"
LLAMA_BEGIN = "<|python_tag|>"
MISTRAL_BEGIN, MISTRAL_ARGUMENTS = "[TOOL_CALLS]", "[ARGS]"

MARKERS: Mapping[ToolFormat, tuple[str, ...]] = {
    "hermes": (HERMES_BEGIN, HERMES_END),
    "llama3_json": (LLAMA_BEGIN,),
    "mistral": (MISTRAL_BEGIN, MISTRAL_ARGUMENTS),
}
"""What must be seen to parse a format, even where a tokenizer has special tokens for it."""

_ARGUMENTS = ("arguments", "parameters")
_SPACE = " \t\r\n"


def format_of(template: str) -> ToolFormat:
    """The format that a chat template speaks; Hermes', which most share, if in doubt."""
    if MISTRAL_BEGIN in template:
        return "mistral"
    return "llama3_json" if LLAMA_BEGIN in template else "hermes"


def tool_parser(name: ToolFormat) -> OutputParser:
    """A parser of one answer."""
    parsers: Mapping[ToolFormat, Callable[[], OutputParser]] = {
        "hermes": HermesParser,
        "llama3_json": LlamaParser,
        "mistral": MistralParser,
    }
    return parsers[name]()


class _MarkedParser(OutputParser):
    """Content until a marker comes; then calls, which a subclass parses.

    White space before a marker is not content. What turns out not to be a call is content, marker included.
    """

    begin: str

    def __init__(self) -> None:
        self._held = ""
        self._num_calls = 0
        self._call: CallScanner | None = None
        self._raw = ""  # of the call, as long as it may turn out to be content
        self._in_calls = False

    def feed(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        text, self._held = self._held + text, ""
        while text:
            text = self._step(text, pieces)
        return pieces

    def _step(self, text: str, pieces: list[Piece]) -> str:
        """Read some of the text; what is left to read at once. What must wait goes to `_held`."""
        if self._call is not None:
            return self._read_call(self._call, text, pieces)
        return self._read_between(text, pieces) if self._in_calls else self._read_content(text, pieces)

    def _read_content(self, text: str, pieces: list[Piece]) -> str:
        before, marker, after = text.partition(self.begin)
        if marker:
            self._add_content(before.rstrip(), pieces)
            self._in_calls, self._raw = True, marker
            return after
        shown = len(text) - held_length(text, self.begin)
        shown = len(text[:shown].rstrip())
        self._held = text[shown:]
        self._add_content(text[:shown], pieces)
        return ""

    def _add_content(self, text: str, pieces: list[Piece]) -> None:
        if text:
            pieces.append(Content(text))

    def _read_between(self, text: str, pieces: list[Piece]) -> str:
        """After a marker, where a call begins, or the calls end."""
        raise NotImplementedError

    def _raw_to_content(self, pieces: list[Piece]) -> None:
        """It was not a call."""
        pieces.append(Content(self._raw))
        self._raw = ""

    def _begin_call(self) -> None:
        self._call = CallScanner(self._num_calls)

    def _read_call(self, call: CallScanner, text: str, pieces: list[Piece]) -> str:
        found, rest = call.feed(text)
        pieces += found
        self._raw += text[: len(text) - len(rest)]
        if call.done:
            self._num_calls += 1
            self._call, self._raw = None, ""
        elif call.failed:
            self._give_up(call, pieces)
        return rest

    def _give_up(self, call: CallScanner, pieces: list[Piece]) -> None:
        if call.has_begun:
            self._num_calls += 1  # its arguments stay as they are
        else:
            pieces.append(Content(self._raw))
        self._call, self._raw, self._in_calls = None, "", False

    def finish(self) -> list[Piece]:
        pieces: list[Piece] = []
        if self._call is not None:
            self._give_up(self._call, pieces)
        rest = self._raw + self._held
        self._raw = self._held = ""
        if rest.strip() or (rest and not self._num_calls):
            pieces.append(Content(rest))
        return pieces


class HermesParser(_MarkedParser):
    """`<tool_call>{"name": …, "arguments": {…}}</tool_call>`, any number of times (Hermes, Qwen)."""

    begin = HERMES_BEGIN

    def _read_between(self, text: str, pieces: list[Piece]) -> str:
        if self._raw:  # the marker has just come
            self._begin_call()
            return text
        stripped = text.lstrip()
        if stripped.startswith(HERMES_END):
            self._in_calls = False
            return stripped[len(HERMES_END) :]
        if HERMES_END.startswith(stripped):
            self._held = stripped
        else:  # it forgot to close
            self._in_calls = False
            return text
        return ""


class LlamaParser(_MarkedParser):
    """`{"name": …, "parameters": {…}}`, several with `;` between them; `<|python_tag|>` may come first (Llama 3)."""

    begin = LLAMA_BEGIN

    def __init__(self) -> None:
        super().__init__()
        self._opened = False

    def _read_content(self, text: str, pieces: list[Piece]) -> str:
        stripped = text.lstrip()
        if self._opened or (stripped and not stripped.startswith("{")):
            self._opened = self._opened or not LLAMA_BEGIN.startswith(stripped)
            return super()._read_content(text, pieces)
        if not stripped:
            self._held = text
            return ""
        self._opened = self._in_calls = True
        return stripped

    def _read_between(self, text: str, pieces: list[Piece]) -> str:
        stripped = text.lstrip(" \t\r\n;")
        self._opened = True
        if stripped.startswith("{"):
            self._begin_call()
            return stripped
        if not stripped:
            self._held = text
            return ""
        self._in_calls = False
        if not self._raw:  # what follows a call
            return stripped
        self._raw_to_content(pieces)
        return text


class MistralParser(_MarkedParser):
    """`[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, or, since tokenizer v11, `[TOOL_CALLS]name[ARGS]{…}`."""

    begin = MISTRAL_BEGIN

    def __init__(self) -> None:
        super().__init__()
        self._in_list = False
        self._arguments: JsonValue | None = None

    def _step(self, text: str, pieces: list[Piece]) -> str:
        return self._read_arguments(text, pieces) if self._arguments is not None else super()._step(text, pieces)

    def _read_between(self, text: str, pieces: list[Piece]) -> str:
        stripped = text.lstrip()
        if not stripped:
            self._held = text
            return ""
        if self._in_list:
            return self._read_list(stripped)
        if not self._raw:  # a named call has ended
            self._in_calls = False
            return stripped
        if stripped[0] == "[":
            self._in_list = True
            self._raw += "["
            return stripped[1:]
        return self._read_name(stripped, pieces)

    def _read_list(self, text: str) -> str:
        if text[0] == ",":
            return text[1:]
        if text[0] == "]":
            self._in_list = self._in_calls = False
            self._raw = ""
            return text[1:]
        self._begin_call()
        return text

    def _read_name(self, text: str, pieces: list[Piece]) -> str:
        name, brace, rest = text.partition("{")
        if not brace:
            self._held = text
            return ""
        name = name.split("[", 1)[0].strip()
        if not name:
            self._in_calls = False
            self._raw_to_content(pieces)
            return text
        self._raw = ""
        self._arguments = JsonValue("{")
        pieces += [CallBegin(self._num_calls, name), CallArguments(self._num_calls, "{")]
        return rest

    def _read_arguments(self, text: str, pieces: list[Piece]) -> str:
        assert self._arguments is not None
        taken = 0
        while taken < len(text) and not self._arguments.done:
            self._arguments.take(text[taken])
            taken += 1
        if taken:
            pieces.append(CallArguments(self._num_calls, text[:taken]))
        if self._arguments.done:
            self._arguments = None
            self._num_calls += 1
        return text[taken:]

    def _give_up(self, call: CallScanner, pieces: list[Piece]) -> None:
        super()._give_up(call, pieces)
        self._in_list = False


# --- one call -----------------------------------------------------------------------------------


class JsonValue:
    """Finds where one JSON value ends, given its first character and those that follow."""

    def __init__(self, first: str) -> None:
        self.done = False
        self._chars: list[str] = []
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self.is_bare = first not in '"{['  # a number or a word, which only what follows ends
        self.take(first)

    @property
    def text(self) -> str:
        """Everything taken so far."""
        return "".join(self._chars)

    def take(self, char: str) -> bool:
        """Take one character if it belongs to the value."""
        if self.is_bare and char in _SPACE + ",}]":
            self.done = True
            return False
        self._chars.append(char)
        if self._in_string:
            self._in_string = self._escaped or char != '"'
            self._escaped = char == "\\" and not self._escaped
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
        self.done = not self.is_bare and not self._in_string and self._depth == 0
        return True


class CallScanner:
    """Parses one `{"name": …, "arguments": {…}}`, character by character; `parameters` is another word for arguments.

    Attributes:
        done: the object is complete; what follows is not taken.
        failed: this is no such object; what follows is not taken.
    """

    def __init__(self, index: int) -> None:
        self.done = False
        self.failed = False
        self._index = index
        self._expected: Literal["open", "key", "colon", "value", "comma"] = "open"
        self._key = ""
        self._value: JsonValue | None = None  # of a key or of a value, as `_expected` says
        self._name: str | None = None
        self._streaming = False
        self._has_arguments = False
        self._unsent = ""  # arguments
        self._pieces: list[Piece] = []

    @property
    def has_begun(self) -> bool:
        """Whether the call's name is known."""
        return self._name is not None

    def feed(self, text: str) -> tuple[list[Piece], str]:
        """The pieces that are certain now, and what of the text comes after the object."""
        taken = 0
        while taken < len(text) and not (self.done or self.failed):
            self._take(text[taken])
            taken += 1
        if self.has_begun and self._unsent:
            self._pieces.append(CallArguments(self._index, self._unsent))
            self._unsent = ""
        pieces, self._pieces = self._pieces, []
        return pieces, text[taken:]

    def _take(self, char: str) -> None:
        if self._value is not None:
            belongs = self._value.take(char)
            if belongs and self._streaming:
                self._unsent += char
            if self._value.done:
                self._end_value(self._value)
            if belongs:
                return
        if char in _SPACE:
            return
        match self._expected, char:
            case "open", "{":
                self._expected = "key"
            case "key", '"':
                self._value = JsonValue(char)
            case (("key" | "comma"), "}"):
                self._end()
            case "comma", ",":
                self._expected = "key"
            case "colon", ":":
                self._expected = "value"
            case "value", _ if char not in ",}]:":
                self._begin_value(char)
            case _:
                self.failed = True

    def _begin_value(self, char: str) -> None:
        self._value = JsonValue(char)
        self._streaming = self._key in _ARGUMENTS and char == "{" and not self._has_arguments
        if self._streaming:
            self._has_arguments = True
            self._unsent += char

    def _end_value(self, value: JsonValue) -> None:
        self._value = None
        if self._expected == "key":
            self._key = str(_parsed(value.text))
            self._expected = "colon"
            return
        self._expected = "comma"
        if self._key == "name" and self._name is None:
            self._take_name(_parsed(value.text))
        elif self._key in _ARGUMENTS and not self._has_arguments:
            self._has_arguments = True
            self._unsent += _as_arguments(value.text)
        self._streaming = False

    def _take_name(self, name: object) -> None:
        if isinstance(name, str) and name:
            self._name = name
            self._pieces.append(CallBegin(self._index, name))
        else:
            self.failed = True

    def _end(self) -> None:
        self.done, self.failed = self.has_begun, not self.has_begun
        if not self._has_arguments:
            self._unsent = "{}"


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _as_arguments(text: str) -> str:
    """Arguments that are not an object: some models write them as JSON within a string, or null for none."""
    value = _parsed(text)
    if isinstance(value, str):
        return value
    return "{}" if value is None else text
