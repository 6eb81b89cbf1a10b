"""`shuteye resume`: end a pause.

Knows nothing of who paused.
"""

from __future__ import annotations

from shuteye.cli.remote import Remote
from shuteye.cli.terminal import show


def resume(*, remote: Remote | None = None) -> None:
    """Let a paused model's requests run again; a sleeping one must be woken first."""
    with (remote or Remote()).connect() as client:
        was_paused = client.is_paused()
        client.resume()
    show("Requests run again." if was_paused else "Nothing to do: not paused.")
