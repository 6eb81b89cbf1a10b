"""`shuteye ps`: what servers are doing, where their memory is, and what waking them would take."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

from cyclopts import Parameter

from shuteye.cli.quantities import format_seconds, format_size
from shuteye.cli.remote import AsJson, Remote
from shuteye.cli.terminal import show, show_json, table
from shuteye.client import ServerState
from shuteye.errors import ShuteyeError
from shuteye.state import RankState, TagState

UNREACHABLE = 1
ENDED = ("failed", "dead", "closed")
"""Statuses of a server without an engine: what it knew of memory is past."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """What one server said, or why it did not."""

    url: str
    version: str = ""
    server: ServerState | None = None
    error: ShuteyeError | None = None

    def as_json(self) -> dict[str, Any]:
        if self.server is None:
            return {"url": self.url, "error": self.error.message if self.error else None}
        return {"url": self.url, "version": self.version, **asdict(self.server)}


def ps(
    urls: Annotated[
        tuple[str, ...], Parameter(help="Addresses of servers, instead of --url; one line each.", negative="")
    ] = (),
    /,
    *,
    as_json: AsJson = False,
    remote: Remote | None = None,
) -> int:
    """Show servers' states: awake or asleep, what is resident, where the rest is, and what a wake would bring back.

    With several addresses the exit status is 1 if one of them does not answer.
    """
    remote = remote or Remote()
    if len(urls) <= 1:
        return _ps_one(replace(remote, url=urls[0]) if urls else remote, as_json=as_json)
    seen = [_ask(replace(remote, url=url)) for url in urls]
    if as_json:
        show_json([one.as_json() for one in seen])
    else:
        show(table(("URL", "MODEL", "STATUS", "RESIDENT ", "AWAY ", "WAKE "), map(_line, seen)))
    return UNREACHABLE if any(one.server is None for one in seen) else 0


def _ask(remote: Remote) -> _Seen:
    try:
        with remote.connect() as client:
            return _Seen(remote.url, client.version(), client.state())
    except ShuteyeError as error:
        return _Seen(remote.url, error=error)


def _ps_one(remote: Remote, *, as_json: bool) -> int:
    seen = _ask(remote)
    server = seen.server
    if server is None:
        assert seen.error is not None
        raise seen.error
    if as_json:
        show_json(seen.as_json())
        return 0
    show(f"{seen.url}  shuteye {seen.version}  {', '.join(server.models)}  {_status(server)}")
    if server.status in ENDED:
        show("Its engine is gone, and the model's memory with it: `shuteye restart` loads it again.")
        return 0
    if server.model is not None:
        show(f"Weights: {server.model.weights_are}")
        if server.model.kv_cache_is:
            show(server.model.kv_cache_is)
    if server.state.tags:
        show(table(("TAG", "IS", "RESIDENT ", "SIZE ", "OTHERWISE IN"), map(_row, server.state.tags)))
        if len(server.state.ranks) > 1:
            show(table(("RANK ", "PLACE", "HOST", "PID ", "IS", "RESIDENT "), map(_rank_row, server.state.ranks)))
        show(_next_step(server))
    return 0


def _line(seen: _Seen) -> tuple[str, ...]:
    """One server among several."""
    server = seen.server
    if server is None:
        return (seen.url, "–", type(seen.error).__name__, "–", "–", "–")
    if server.status in ENDED:
        return (seen.url, ", ".join(server.models), _status(server), "–", "–", "–")
    resident = sum(tag.resident_bytes for tag in server.state.tags)
    asleep = server.state.is_sleeping
    away, expected = server.waking.restore_bytes, server.waking.expected_s
    return (
        seen.url,
        ", ".join(server.models),
        _status(server),
        format_size(resident),
        format_size(away) if asleep else "–",
        "–" if not asleep else "not measured" if expected is None else f"~{format_seconds(expected)}",
    )


def _row(tag: TagState) -> tuple[str, ...]:
    return (tag.tag, tag.residency, format_size(tag.resident_bytes), format_size(tag.nbytes), tag.backing or "–")


def _rank_row(rank: RankState) -> tuple[str, ...]:
    resident = sum(tag.resident_bytes for tag in rank.tags)
    tags = ", ".join(f"{tag.tag} {tag.residency}" for tag in rank.tags)
    return (str(rank.rank), rank.place, rank.host, str(rank.pid), rank.failure or tags, format_size(resident))


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


def _next_step(server: ServerState) -> str:
    """What keeps requests from running, and what ends that."""
    if server.state.faulted is not None:
        return "`shuteye wake` tries to recover it."
    if server.state.is_sleeping:
        paused = " It is paused, too: `shuteye resume` after the wake." if server.state.paused else ""
        return _wake_cost(server) + paused
    return "Nothing to wake; `shuteye resume` ends the pause." if server.state.paused else "Nothing to wake."


def _wake_cost(server: ServerState) -> str:
    """What a full wake would have to bring back, and how long it should take if one was measured; no other guess."""
    parts = "; ".join(_tag_cost(tag) for tag in server.state.tags if tag.residency != "resident")
    last, expected = server.waking.last_wake_s, server.waking.expected_s
    if server.waking.restore_bytes == 0:  # the last wake of weights says nothing about this one
        return f"Waking: {parts}."
    pace = f" Expected: {format_seconds(expected)}." if expected is not None else ""
    return f"Waking: {parts}." + ("" if last is None else f" The last wake took {format_seconds(last)}.") + pace


def _tag_cost(tag: TagState) -> str:
    if tag.tag == "kv_cache":
        return f"kv_cache is mapped empty ({format_size(tag.nbytes)}, taking memory only as it fills)"
    if tag.residency == "blank":
        return (
            f"{tag.tag} wait to be written by update_weights or reload_weights "
            "(or `shuteye sleep --level 2`, then `shuteye wake`, to load them from the image)"
        )
    if tag.residency == "discarded":
        return f"{tag.tag} are loaded again, {format_size(tag.nbytes)} from the image or checkpoint"
    return f"{tag.tag} are brought back, {format_size(tag.nbytes)} from {tag.backing or 'their backing'}"
