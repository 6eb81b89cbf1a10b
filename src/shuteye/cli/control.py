"""The commands that ask a running server: sleep, wake, pause, resume, reload, update, restart, stop."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, BinaryIO

from cyclopts import Parameter

from shuteye.calls import PauseCall, SleepCall, UnloadCall, WakeCall
from shuteye.cli.quantities import format_seconds, format_size
from shuteye.cli.remote import AsJson, Remote, takes
from shuteye.cli.terminal import show, show_json, table
from shuteye.client import Client
from shuteye.errors import InvalidRequest, ServerUnreachable
from shuteye.state import EngineState, SleepReport, UpdateReport, WakeReport


@takes(SleepCall, "level", "mode", "tags")
def sleep(call: SleepCall, *, as_json: AsJson = False, remote: Remote | None = None) -> None:
    """Put a served model to sleep; prints the memory that was measured to come back."""
    with (remote or Remote()).connect() as client:
        report = client.control(call)
    if as_json:
        show_json(asdict(report))
    else:
        _show_sleep(report)


def _show_sleep(report: SleepReport) -> None:
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


@takes(WakeCall, "tags")
def wake(call: WakeCall, *, as_json: AsJson = False, remote: Remote | None = None) -> None:
    """Wake a served model; prints what was brought back, and how it was verified."""
    with (remote or Remote()).connect() as client:
        report = client.control(call)
        state = None if as_json else client.state().state
    if state is None:
        show_json(asdict(report))
    else:
        _show_wake_up(report, state)


def _show_wake_up(report: WakeReport, state: EngineState) -> None:
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
    if report.updates_lost:
        show("Weights that update_weights had written were lost in a fault; these are the image's. Write them again.")
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


@takes(UnloadCall, "mode")
def unload(call: UnloadCall, *, as_json: AsJson = False, remote: Remote | None = None) -> None:
    """End a served model's engine process, which gives back all it has; `shuteye wake` starts another one."""
    with (remote or Remote()).connect() as client:
        report = client.control(call)
    if as_json:
        show_json(asdict(report))
    elif report.changed:
        show(f"Unloaded in {format_seconds(report.seconds)}: {format_size(report.freed_bytes)} given back.")
    else:
        show("Nothing to do: already unloaded.")


@takes(PauseCall, "mode")
def pause(call: PauseCall, *, remote: Remote | None = None) -> None:
    """Stop a served model's requests, giving no memory back.

    Until `shuteye resume`, requests that come are answered with 503; after `--mode keep` they wait.
    """
    with (remote or Remote()).connect() as client:
        client.control(call)
    show("Paused; `shuteye resume` lets requests run again.")


def resume(*, remote: Remote | None = None) -> None:
    """Let a paused model's requests run again; a sleeping one must be woken first."""
    with (remote or Remote()).connect() as client:
        was_paused = client.is_paused()
        client.resume()
    show("Requests run again." if was_paused else "Nothing to do: not paused.")


def reload(
    path: Annotated[
        str | None, Parameter(help="A checkpoint on the server's host; the image that was loaded last unless given.")
    ] = None,
    /,
    *,
    as_json: AsJson = False,
    remote: Remote | None = None,
) -> None:
    """Load every weight of a served model again; requests that run are computed again with them."""
    with (remote or Remote()).connect() as client:
        _show_update(client.reload_weights(path), as_json=as_json)


def update(
    path: Annotated[
        Path, Parameter(help="A safetensors file, which is sent; with --on-server, also a directory of such files.")
    ],
    /,
    *,
    on_server: Annotated[bool, Parameter(help="PATH is on the server's host: nothing is sent.", negative="")] = False,
    as_json: AsJson = False,
    remote: Remote | None = None,
) -> None:
    """Write new weights into a served model, by their checkpoint names; requests that run are computed again."""
    with (remote or Remote()).connect() as client, ExitStack() as stack:
        if on_server:
            report = client.update_weights(str(path))
        else:
            report = client.upload_weights(stack.enter_context(_opened(path)))
    _show_update(report, as_json=as_json)


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise InvalidRequest(
            f"{path} cannot be read ({error.strerror}); is it on the server? Then: --on-server."
        ) from error


def _show_update(report: UpdateReport, *, as_json: bool) -> None:
    if as_json:
        show_json(asdict(report))
        return
    show(f"{report.updated} tensors, {format_size(report.updated_bytes)}, written in {format_seconds(report.seconds)}.")
    if report.missing:
        show(f"Not serving yet: {len(report.missing)} tensors must be written first, {report.missing[0]} among them.")


def restart(*, remote: Remote | None = None) -> None:
    """Start a server's dead or hung engine again; the server itself goes on listening all the while."""
    with (remote or Remote()).connect() as client:
        seconds = client.restart_engine()
    show(f"The engine is loaded again after {format_seconds(seconds)}.")


POLL_S = 0.1
"""How often a server that stops is asked whether it still does."""


def stop(*, remote: Remote | None = None) -> None:
    """Stop a server as SIGTERM does, and wait until it is gone; what runs has --shutdown-grace-s to finish."""
    remote = remote or Remote()
    began = time.monotonic()
    with remote.connect() as client:
        client.shutdown()
        while _is_stopping(client):
            if time.monotonic() - began > remote.timeout_s:
                raise ServerUnreachable(
                    f"{remote.url} is still stopping after {format_seconds(remote.timeout_s)}: requests are running. "
                    "It ends by itself after its --shutdown-grace-s."
                )
            time.sleep(POLL_S)
    show(f"Stopped in {format_seconds(time.monotonic() - began)}.")


def _is_stopping(client: Client) -> bool:
    """False once nothing answers there, or another server does."""
    try:
        return client.is_stopping()
    except ServerUnreachable:
        return False
