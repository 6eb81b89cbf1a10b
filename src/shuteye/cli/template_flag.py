"""`--chat-template`: a Jinja template, given as it is or as the file that it is in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cyclopts import Token

MAX_BYTES = 1024 * 1024
"""Of a file: templates have some kilobytes, and a file without an end would be read for ever."""

_MARKS = ("{{", "{%", "{#")


def template_converter(_type: Any, tokens: Sequence[Token]) -> str:
    """What cyclopts calls for a template.

    Raises:
        ValueError: there is no such file, or it is not a template.
    """
    from shuteye.chat_template import require_template
    from shuteye.errors import InvalidRequest

    given = tokens[0].value
    is_text = any(mark in given for mark in _MARKS)
    source = given if is_text else _read(given)
    try:
        require_template(source, param="the text" if is_text else given)
    except InvalidRequest as error:
        raise ValueError(error.message) from error
    return source


def _read(path: str) -> str:
    try:
        with Path(path).expanduser().open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"{path} has more than {MAX_BYTES:,} bytes.")
        return content.decode()
    except OSError as error:
        raise ValueError(
            f"{path!r} is no file that can be read ({error.strerror}), and no Jinja template: it has none of "
            f"{' '.join(_MARKS)}."
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error.reason} at byte {error.start}.") from error
