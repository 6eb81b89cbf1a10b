"""Writes docs/reference/cli.md: what every command says of itself with --help.

Knows nothing of the commands but their names; `tests/cli/test_reference.py` checks that the page is up to date.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "cli.md"
COMMANDS = (
    *("", "serve", "chat", "pull", "sleep", "wake", "pause", "resume", "reload", "update", "restart", "ps", "bench"),
    *("images", "images ls", "images rm", "images verify", "fleet", "fleet simulate"),
)
_ASK_ALL = """
import sys
from shuteye.cli.main import run
for command in sys.argv[1:]:
    assert run([*command.split(), "--help"]) == 0
    print(end="\\f")
"""
_HEADER = "# Command line\n\nWritten by `make docs` from each command's own `--help`; edit the help, not this page.\n"


def render() -> str:
    """The whole page."""
    return _HEADER + "".join(itertools.starmap(_section, zip(COMMANDS, _helps(), strict=True)))


def _helps() -> list[str]:
    """What each command says, all of them in one process: most of the time is its imports."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SHUTEYE_")}
    environment |= {"COLUMNS": "110", "TERM": "dumb", "PYTHONIOENCODING": "utf-8"}
    call = [sys.executable, "-c", _ASK_ALL, *COMMANDS]
    done = subprocess.run(call, capture_output=True, encoding="utf-8", check=True, env=environment)
    return done.stdout.split("\f")[:-1]


def _section(command: str, text: str) -> str:
    lines = "\n".join(line.rstrip() for line in text.strip().splitlines())
    return f"\n## {f'shuteye {command}'.strip()}\n\n```text\n{lines}\n```\n"


if __name__ == "__main__":
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(render(), encoding="utf-8")
