"""Reads one tool call, a JSON object with a name and arguments, character by character as it is written.

Knows nothing of what stands around the object.
"""

from __future__ import annotations

import json
from typing import Literal

from shuteye.server.parsing.pieces import CallArguments, CallBegin, Piece

_ARGUMENTS = ("arguments", "parameters")
_SPACE = " \t\r\n"


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
    """One `{"name": …, "arguments": {…}}`; `parameters` is another word for arguments.

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
        self._untold = ""  # arguments
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
        if self.has_begun and self._untold:
            self._pieces.append(CallArguments(self._index, self._untold))
            self._untold = ""
        pieces, self._pieces = self._pieces, []
        return pieces, text[taken:]

    def _take(self, char: str) -> None:
        if self._value is not None:
            belongs = self._value.take(char)
            if belongs and self._streaming:
                self._untold += char
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
            self._untold += char

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
            self._untold += _as_arguments(value.text)
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
            self._untold = "{}"


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
