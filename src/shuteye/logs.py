"""What log lines look like, as text or JSON, and which HTTP request each one belongs to.

An engine process is told to log as the process that started it does (`settings`).
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

LogFormat = Literal["auto", "text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

TEXT_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"

REQUEST_ID: ContextVar[str | None] = ContextVar("shuteye_request_id", default=None)
"""The id of the HTTP request that the current task answers; None outside of one."""

_BUILT_IN = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName", "color_message"}
"""What every record has, or uvicorn gives for terminals; the rest was given as `extra`."""


@dataclass(frozen=True, slots=True)
class LogSettings:
    """How a process logs: `auto` is short lines with colours on a terminal, `text` elsewhere."""

    format: LogFormat = "auto"
    level: LogLevel = "info"


_RED, _YELLOW, _DIM = "31", "33", "2"
"""Parameters of SGR (ECMA-48, 8.3.117)."""

_settings = LogSettings()


def settings() -> LogSettings:
    """How this process logs, as `configure` was told; the defaults if it was not called."""
    return _settings


def configure(chosen: LogSettings) -> None:
    """Log to stderr as `chosen` says; replaces what an earlier call set up, and nothing else."""
    global _settings  # noqa: PLW0603 - as logging itself, this is one per process
    _settings = chosen
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_formatter(chosen))
    if is_for_a_terminal():
        handler.addFilter(_is_news)
    handler.set_name("shuteye")
    root = logging.getLogger()
    for old in [one for one in root.handlers if one.name == "shuteye"]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(max(logging.WARNING, logging.getLevelNamesMapping()[chosen.level.upper()]))
    for name in ("shuteye", "uvicorn"):
        logging.getLogger(name).setLevel(chosen.level.upper())


def is_for_a_terminal() -> bool:
    """Whether somebody reads the log as it is written, and needs no more of it than what is new."""
    return _settings.format == "auto" and sys.stderr.isatty()


def _formatter(chosen: LogSettings) -> logging.Formatter:
    if chosen.format == "json":
        return JsonFormatter()
    return TerminalFormatter() if is_for_a_terminal() else TextFormatter()


def _is_news(record: logging.LogRecord) -> bool:
    """False for what uvicorn tells of its own start and end, which our own lines tell, too."""
    return record.name != "uvicorn.error" or record.levelno > logging.INFO


class TerminalFormatter(logging.Formatter):
    """A line for who watches: the time, the message, and what is wrong in colour (not with `NO_COLOR`)."""

    def __init__(self) -> None:
        super().__init__("%(message)s")
        self._coloured = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"  # https://no-color.org

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The line without traceback."""
        request_id = REQUEST_ID.get()
        message = super().formatMessage(record)
        if record.levelno >= logging.WARNING:
            message = self._in(_RED if record.levelno >= logging.ERROR else _YELLOW, message)
        time = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        return " ".join([self._in(_DIM, time), message, *([self._in(_DIM, f"[{request_id}]")] if request_id else [])])

    def _in(self, colour: str, text: str) -> str:
        return f"\033[{colour}m{text}\033[0m" if self._coloured else text


class TextFormatter(logging.Formatter):
    """One line for people; the request's id, if there is one, stands at its end."""

    def __init__(self) -> None:
        super().__init__(TEXT_FORMAT)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The line without traceback."""
        request_id = REQUEST_ID.get()
        line = super().formatMessage(record)
        return line if request_id is None else f"{line} [{request_id}]"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, request_id, whatever was given as `extra`, exception."""

    def format(self, record: logging.LogRecord) -> str:
        """The line; a value that JSON does not know is written as text."""
        return json.dumps(self._fields(record), default=str, ensure_ascii=False)

    def _fields(self, record: logging.LogRecord) -> Mapping[str, Any]:
        fields: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        request_id = REQUEST_ID.get()
        if request_id is not None:
            fields["request_id"] = request_id
        fields |= {name: value for name, value in record.__dict__.items() if name not in _BUILT_IN}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return fields
