"""`shuteye ps`: what a server is doing, where its memory is, and what waking it would take.

Knows nothing of how the server found out.
"""

from __future__ import annotations

from dataclasses import asdict

from shuteye.cli.remote import AsJson, Remote
from shuteye.cli.sizes import format_seconds, format_size
from shuteye.cli.terminal import show, show_json, table
from shuteye.client import ServerState
from shuteye.outputs import TagState


def ps(*, as_json: AsJson = False, remote: Remote | None = None) -> None:
    """Show a server's state: awake or asleep, what is resident, where the rest is, and what a wake would bring back."""
    remote = remote or Remote()
    with remote.connect() as client:
        version, server = client.version(), client.state()
    if as_json:
        show_json({"url": remote.url, "version": version, **asdict(server)})
        return
    show(f"{remote.url}  shuteye {version}  {', '.join(server.models)}  {_status(server)}")
    if server.state.tags:
        show(table(("TAG", "IS", "RESIDENT ", "SIZE ", "OTHERWISE IN"), map(_row, server.state.tags)))
        show(_wake_cost(server))


def _row(tag: TagState) -> tuple[str, ...]:
    return (tag.tag, tag.residency, format_size(tag.resident_bytes), format_size(tag.nbytes), tag.backing or "–")


def _status(server: ServerState) -> str:
    """The most important thing first."""
    if server.status == "starting":
        return "loading"
    if server.status != "ready":
        return server.status if server.failure is None else f"{server.status}: {server.failure}"
    if server.state.faulted is not None:
        return f"faulted: {server.state.faulted}"
    return _activity(server)


def _activity(server: ServerState) -> str:
    state = server.state
    if state.transition is not None:
        return f"in transition: {state.transition}"
    if state.is_sleeping:
        return "asleep" if state.level is None else f"asleep at level {state.level}"
    if state.paused:
        return "awake, paused"
    return "awake, serving" if server.ready else f"awake, gate {state.gate}"


def _wake_cost(server: ServerState) -> str:
    """What a full wake would have to bring back, and how long the last one took; no guess at how long the next will."""
    if not server.state.is_sleeping:
        return "Nothing to wake."
    parts = "; ".join(_tag_cost(tag) for tag in server.state.tags if tag.residency != "resident")
    last = server.waking.last_wake_s
    return f"Waking: {parts}." + ("" if last is None else f" The last wake took {format_seconds(last)}.")


def _tag_cost(tag: TagState) -> str:
    if tag.tag == "kv_cache":
        return f"kv_cache is mapped empty ({format_size(tag.nbytes)}, taking memory only as it fills)"
    if tag.residency == "blank":
        return f"{tag.tag} wait to be written by update_weights or reload_weights"
    if tag.residency == "discarded":
        return f"{tag.tag} are loaded again, {format_size(tag.nbytes)} from the image or checkpoint"
    return f"{tag.tag} are brought back, {format_size(tag.nbytes)} from {tag.backing or 'their backing'}"
