"""`shuteye restart`: start the engine of a running server anew after it died, or while it hangs.

Knows nothing of why it did; `shuteye ps` says that.
"""

from __future__ import annotations

from shuteye.cli.remote import Remote
from shuteye.cli.sizes import format_seconds
from shuteye.cli.terminal import show


def restart(*, remote: Remote | None = None) -> None:
    """Start a server's dead or hung engine anew; the server itself goes on listening all the while."""
    with (remote or Remote()).connect() as client:
        seconds = client.restart_engine()
    show(f"The engine is loaded again after {format_seconds(seconds)}.")
