"""The `shuteye` command, and `python -m shuteye`: what must be in place before anything else is imported.

`serve` may be asked to stop by a signal before it has been imported.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def _end(_number: int, _frame: FrameType | None) -> None:
    os._exit(0)  # asked to stop, and nothing was begun that would have to be ended


def main() -> None:
    """The console script."""
    if sys.argv[1:2] == ["serve"]:  # until `cli/apart.py` and `server/launch.py` do
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _end)
        from shuteye.cli.apart import serve

        sys.exit(serve())
    from shuteye.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
