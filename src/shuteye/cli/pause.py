"""`shuteye pause`: stop a served model's requests, and keep all of its memory.

Knows nothing of what becomes of requests in flight; the mode decides.
"""

from __future__ import annotations

from typing import Annotated, Literal

from cyclopts import Parameter

from shuteye.cli.remote import Remote
from shuteye.cli.terminal import show


def pause(
    *,
    mode: Annotated[
        Literal["abort", "wait", "keep"] | None,
        Parameter(help="Requests in flight: end them, let them finish, or resume them after the pause."),
    ] = None,
    remote: Remote | None = None,
) -> None:
    """Stop a served model's requests, giving no memory back.

    Until `shuteye resume`, requests that come are answered with 503; after `--mode keep` they wait.
    """
    with (remote or Remote()).connect() as client:
        client.pause(mode)
    show("Paused; `shuteye resume` lets requests run again.")
