"""`python -m shuteye` is the `shuteye` command.

Knows nothing else.
"""

from __future__ import annotations

from shuteye.cli.main import main

if __name__ == "__main__":
    main()
