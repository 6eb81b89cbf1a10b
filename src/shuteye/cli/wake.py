"""`shuteye wake`: wake a served model and say what that took.

Knows nothing of how a model wakes.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from cyclopts import Parameter

from shuteye.cli.remote import AsJson, Remote, TagName
from shuteye.cli.sizes import format_seconds, format_size
from shuteye.cli.terminal import show, show_json, table
from shuteye.outputs import WakeReport


def wake(
    *,
    tags: Annotated[
        tuple[TagName, ...] | None,
        Parameter(help="Wake only these.", consume_multiple=True, negative=""),
    ] = None,
    as_json: AsJson = False,
    remote: Remote | None = None,
) -> None:
    """Wake a served model; prints what was brought back, and how it was verified."""
    with (remote or Remote()).connect() as client:
        report = client.wake_up(tags)
    if as_json:
        show_json(asdict(report))
    else:
        _show(report)


def _show(report: WakeReport) -> None:
    if not report.changed:
        show("Nothing to do: already awake.")
        return
    source = f" from {report.weights_source}" if report.weights_source else ""
    show(f"Woken in {format_seconds(report.seconds)}: {format_size(report.restored_bytes)} brought back{source}.")
    show(_verification(report))
    if report.missing:
        show(f"Not serving yet: {len(report.missing)} tensors must be written first, {report.missing[0]} among them.")
    rows = [
        (tag.tag, tag.residency, format_size(tag.restored_bytes), format_seconds(tag.seconds)) for tag in report.tags
    ]
    if rows:
        show(table(("TAG", "NOW", "RESTORED ", "TIME "), rows))


def _verification(report: WakeReport) -> str:
    canary = "the canary gave the same logits" if report.canary else "no canary ran"
    if report.verified == "off":
        return f"Checksums were not compared; {canary}."
    return f"Checksums of {format_size(report.verified_bytes)} agree ({report.verified}); {canary}."
