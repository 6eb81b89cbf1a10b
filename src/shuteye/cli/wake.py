"""`shuteye wake`: wake a served model and say what that took.

Knows nothing of how a model wakes.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from shuteye.cli.remote import AsJson, Remote, tags_parameter
from shuteye.cli.sizes import format_seconds, format_size
from shuteye.cli.terminal import show, show_json, table
from shuteye.outputs import EngineState, WakeReport


def wake(
    *,
    tags: Annotated[tuple[str, ...] | None, tags_parameter("Wake only these")] = None,
    as_json: AsJson = False,
    remote: Remote | None = None,
) -> None:
    """Wake a served model; prints what was brought back, and how it was verified."""
    with (remote or Remote()).connect() as client:
        report = client.wake_up(tags)
        state = None if as_json else client.state().state
    if state is None:
        show_json(asdict(report))
    else:
        _show(report, state)


def _show(report: WakeReport, state: EngineState) -> None:
    if report.changed and report.tags:
        _show_wake(report)
    elif report.changed:
        show("Awake again; at level 0 no memory had been given back.")
    elif not state.is_sleeping:
        show("Nothing to do: already awake.")
    else:
        show("Nothing to do: what was to be woken is awake.")
    away = [tag.tag for tag in state.tags if tag.residency not in ("resident", "blank")]
    if state.missing:
        show(
            f"Not serving yet: {len(state.missing)} tensors must be written first, {state.missing[0]} among them, by "
            "update_weights or reload_weights. To load the image's: `shuteye sleep --level 2`, then `shuteye wake`."
        )
    elif away:
        show(f"Still asleep: {' and '.join(away)}. `shuteye wake` wakes all of it.")
    if state.paused:
        show("Still paused: `shuteye resume` lets requests run.")


def _show_wake(report: WakeReport) -> None:
    has_weights = any(tag.tag == "weights" and tag.residency == "resident" for tag in report.tags)
    source = f" from {report.weights_source}" if has_weights and report.weights_source else ""
    show(f"Woken in {format_seconds(report.seconds)}: {format_size(report.restored_bytes)} brought back{source}.")
    show(_verification(report))
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
