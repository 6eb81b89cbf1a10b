"""`shuteye sleep`: put a served model to sleep and say what came back.

Knows nothing of how a model sleeps.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Literal

from cyclopts import Parameter

from shuteye.cli.flags import INTEGER
from shuteye.cli.remote import AsJson, Remote, tags_parameter
from shuteye.cli.sizes import format_seconds, format_size
from shuteye.cli.terminal import show, show_json, table
from shuteye.outputs import SleepReport


def sleep(
    *,
    level: Annotated[
        Literal[0, 1, 2],
        INTEGER,
        Parameter(help="0 only pauses; 1 gives memory back and keeps the weights restorable; 2 forgets them too."),
    ] = 1,
    mode: Annotated[
        Literal["abort", "wait", "keep"] | None,
        Parameter(help="Requests in flight: end them, let them finish, or resume them after the wake."),
    ] = None,
    tags: Annotated[tuple[str, ...] | None, tags_parameter("Release only these")] = None,
    as_json: AsJson = False,
    remote: Remote | None = None,
) -> None:
    """Put a served model to sleep; prints the memory that was measured to come back."""
    with (remote or Remote()).connect() as client:
        report = client.sleep(level, mode=mode, tags=tags)
    if as_json:
        show_json(asdict(report))
    else:
        _show(report)


def _show(report: SleepReport) -> None:
    if not report.changed:
        show(f"Nothing to do: already asleep at level {report.level}.")
        return
    if report.level == 0:
        show("Paused: no memory is given back at level 0. `shuteye wake` or `shuteye resume` lets requests run.")
        return
    show(
        f"Asleep at level {report.level} in {format_seconds(report.seconds)}: {format_size(report.freed_bytes)} given "
        f"back, {format_size(report.residual_bytes)} still resident."
    )
    if report.aborted_requests or report.held_requests:
        show(f"Requests aborted: {report.aborted_requests}, held: {report.held_requests}.")
    rows = [
        (
            tag.tag,
            tag.residency,
            tag.backing or "–",
            format_size(tag.freed_bytes),
            format_size(tag.saved_bytes),
            format_seconds(tag.seconds),
        )
        for tag in report.tags
    ]
    if rows:
        show(table(("TAG", "NOW", "BACKING", "FREED ", "SAVED ", "TIME "), rows))
