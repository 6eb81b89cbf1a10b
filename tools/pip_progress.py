"""Shortens pip's output to one line that says how far it is: `pip install … | python pip_progress.py TOTAL`.

On a terminal the line is rewritten, elsewhere one is printed every tenth package. Errors go past this on stderr.
"""

import re
import sys
from typing import TextIO

EVERY = 10
PACKAGE = re.compile(
    r"(?:Collecting|Ignoring|Requirement already satisfied:) ([A-Za-z0-9._-]+)|Processing \S*/([A-Za-z0-9._]+)-"
)
DOWNLOAD = re.compile(r"\s+(?:Downloading|Using cached) \S+\.whl \((.+)\)")
INSTALLING = re.compile(r"Installing collected packages: (.+)")


def follow(lines: TextIO, screen: TextIO, *, total: int) -> None:
    """Tell on `screen` what pip says in `lines` about `total` packages."""
    rewrites = screen.isatty()
    count, name = 0, ""
    for line in lines:
        if found := PACKAGE.match(line):
            count, name = count + 1, found[1] or found[2]
            text = f"  [{count}/{total}] {name}"
        elif found := DOWNLOAD.match(line):
            text = f"  [{count}/{total}] {name}, {found[1]}"
        elif found := INSTALLING.match(line):
            text = f"  installing {len(found[1].split(', '))} packages …"
        else:
            continue
        if rewrites:
            screen.write(f"\r\033[K{text}")
        elif found.re is INSTALLING or (found.re is PACKAGE and count % EVERY == 0):
            screen.write(f"{text}\n")
        screen.flush()
    if rewrites:
        screen.write("\r\033[K")


if __name__ == "__main__":
    follow(sys.stdin, sys.stdout, total=int(sys.argv[1]))
