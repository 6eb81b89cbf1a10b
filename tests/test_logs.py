"""Log lines: their shape, the request they belong to, and what they must not hold."""

import json
import logging
import re
import subprocess
import sys

import pytest

from shuteye.logs import REQUEST_ID, JsonFormatter, TerminalFormatter, TextFormatter


def record(message="hello", **extra):
    made = logging.makeLogRecord({"msg": message, "name": "shuteye.x", "levelname": "INFO", "levelno": 20})
    made.__dict__.update(extra)
    return made


@pytest.fixture
def request_id():
    token = REQUEST_ID.set("abc-1")
    yield "abc-1"
    REQUEST_ID.reset(token)


def test_json_lines_are_one_object_each(request_id):
    """Catches a line that a log collector cannot read: newlines, missing fields, values that JSON does not know."""
    line = JsonFormatter().format(record("two\nlines", outcome=("stop",), odd=object))
    assert "\n" not in line
    found = json.loads(line)
    assert (found["level"], found["logger"], found["message"]) == ("info", "shuteye.x", "two\nlines")
    assert (found["request_id"], found["outcome"]) == (request_id, ["stop"])
    assert found["time"].endswith("+00:00")
    assert "object" in found["odd"]
    assert not {"args", "msg", "exc_info", "stack_info"} & found.keys()


def test_json_lines_keep_the_traceback():
    """Catches errors whose cause is lost in the structured form."""
    try:
        int("why")
    except ValueError:
        found = json.loads(JsonFormatter().format(record(exc_info=sys.exc_info())))
    assert "ValueError: invalid literal" in found["exception"]
    assert "request_id" not in found


def test_text_lines_end_with_the_request(request_id):
    """Catches lines of several requests that cannot be told apart."""
    assert TextFormatter().format(record()).endswith("INFO    shuteye.x: hello [abc-1]")


def test_text_lines_outside_of_a_request_have_no_id():
    """Catches `[None]` on every line of a start."""
    assert TextFormatter().format(record()).endswith("shuteye.x: hello")


@pytest.mark.parametrize(("level", "lines"), [("debug", 2), ("info", 1), ("error", 0)])
def test_configure(level, lines):
    """Catches a level that is not honoured, libraries that flood the log, lines printed twice after a second call."""
    code = (
        "import logging; from shuteye import logs\n"
        f"for _ in range(2): logs.configure(logs.LogSettings('json', '{level}'))\n"
        "logging.getLogger('shuteye.a').debug('d'); logging.getLogger('shuteye.a').info('i')\n"
        "logging.getLogger('urllib3').info('noise')\n"
        f"assert logs.settings() == logs.LogSettings('json', '{level}')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = [json.loads(line)["message"] for line in done.stderr.splitlines()]
    assert found == ["d", "i"][2 - lines :]


def test_terminal_lines_are_short_and_mark_what_is_wrong(request_id, monkeypatch):
    """Catches a warning that looks like all else, and colours where they are unwanted or come out as signs."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    wrong = record(levelno=logging.WARNING)
    line = TerminalFormatter().format(wrong)
    assert re.fullmatch(r"\x1b\[2m\d\d:\d\d:\d\d\x1b\[0m \x1b\[33mhello\x1b\[0m \x1b\[2m\[abc-1\]\x1b\[0m", line)
    assert "\x1b[3" not in TerminalFormatter().format(record())
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert "\x1b" not in TerminalFormatter().format(wrong)
