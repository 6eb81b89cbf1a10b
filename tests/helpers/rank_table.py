"""The transaction table of ranks as data: steps of transitions, ways in which a rank fails in them, what follows.

Knows nothing of how a cell is tried; `executors/test_rank_table.py` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shuteye.errors import (
    BackendFailure,
    EngineFaulted,
    InternalError,
    ShuteyeError,
    SleepFailed,
    VerificationFailed,
    WakeFailed,
)

Begin = Literal["awake", "asleep", "without a rank"]
Deed = Literal["sleep", "wake", "step", "first step", "update", "reload"]
End = Literal["awake", "asleep", "faulted"]
Streams = Literal["served", "failed"]

DEADLINE_S = 0.7
START_S = 4.0
"""The deadline of a rank that is started again, which takes long on a busy machine."""
LOST = "rank {rank} was ended by SIGKILL"
LATE = f"rank {{rank}} was killed, as it did not answer {{verb}} within {DEADLINE_S} s"


@dataclass(frozen=True)
class Cell:
    """What follows.

    Attributes:
        how: the rank fails, as in `faulty_rank`.
        error: what the call raises, or the request ends with; None if it succeeds all the same.
        says: which rank, and why, in the error or in the state.
        streams: what becomes of requests in flight, once somebody has woken the model.
    """

    how: str
    end: End
    error: type[ShuteyeError] | None = None
    says: str = ""
    streams: Streams = "served"


@dataclass(frozen=True)
class Row:
    """A step of a transition, on the rank that fails.

    Attributes:
        verb: what the rank is asked.
        after: faults of the same rank that lead there.
        others: faults of the other ranks that lead there.
        dead: the rank itself is the one that had died before, and is started again.
    """

    step: str
    begin: Begin
    deed: Deed
    verb: str
    cells: tuple[Cell, ...]
    after: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    dead: bool = False


def faulted(how: str, says: str, error: type[ShuteyeError] | None = EngineFaulted, **more: Streams) -> Cell:
    return Cell(how, "faulted", error, says, **more)


def lost(
    *, late: str = "stop", error: type[ShuteyeError] | None = EngineFaulted, streams: Streams = "served"
) -> tuple[Cell, ...]:
    """Killed, and past its deadline: the same, but for the cause."""
    return faulted("kill", LOST, error, streams=streams), faulted(late, LATE, error, streams=streams)


def again(*, late: str = "stop") -> tuple[Cell, ...]:
    """A recovery begins again when a rank dies in it."""
    return Cell("kill", "awake"), Cell(late, "awake")


INJECTED = "rank {rank}: Injected into {verb}"

ROWS = (
    Row(
        "estimate",
        *("awake", "sleep", "estimate_sleep"),
        (
            Cell("error", "awake", SleepFailed, f"Still awake, nothing was touched: {INJECTED}"),
            Cell("bug", "awake", SleepFailed, "Still awake, nothing was touched: rank {rank}: .*Injected into {verb}"),
            *lost(),
        ),
    ),
    Row(
        "save",
        *("awake", "sleep", "save"),
        (
            Cell("error", "awake", SleepFailed, f"Still awake, saving failed: {INJECTED}"),
            Cell("full", "awake", SleepFailed, f"Still awake, saving failed: {INJECTED}"),
            Cell("late", "awake", SleepFailed, "Still awake, saving failed: rank {rank}: Injected after save"),
            *lost(late="hang"),
        ),
    ),
    Row(
        "forget what was saved",
        *("awake", "sleep", "abort_save"),
        (Cell("error", "awake", SleepFailed, f"Still awake, saving failed: .*; {INJECTED}"), *lost()),
        others=("save error",),
    ),
    Row("release", "awake", "sleep", "release", (Cell("error", "asleep"), Cell("late", "asleep"), *lost())),
    Row(
        "release again",
        *("awake", "sleep", "finish_release"),
        (Cell("error", "asleep"), *lost(late="hang")),
        after=("release late",),
    ),
    Row(
        "release a third time",
        *("awake", "sleep", "finish_release"),
        (faulted("error", f"releasing failed: {INJECTED}"), *lost()),
        after=("release error", "finish_release error"),
    ),
    Row(
        "look where memory is",
        *("awake", "sleep", "states"),
        (
            faulted("error", f"a rank cannot tell where its memory is: {INJECTED}"),
            faulted("wrong", "the ranks disagree on weights: .*discarded on rank {rank}"),
            *lost(),
        ),
    ),
    Row(
        "look what is left",
        *("awake", "sleep", "residual_bytes"),
        (faulted("error", f"a rank cannot tell how much memory it has: {INJECTED}"), *lost(late="hang")),
    ),
    Row(
        "estimate a wake",
        *("asleep", "wake", "estimate_wake"),
        (
            Cell("error", "asleep", WakeFailed, f"Still asleep, nothing was touched, a retry may work: {INJECTED}"),
            Cell("wrong", "asleep", WakeFailed, "Still asleep, .* for the ranks on .* together and .* are available"),
            *lost(),
        ),
    ),
    Row(
        "restore",
        *("asleep", "wake", "restore"),
        (
            Cell("error", "asleep", WakeFailed, f"Still asleep, a retry may work: {INJECTED}"),
            Cell("full", "asleep", WakeFailed, f"Still asleep, a retry may work: {INJECTED}"),
            Cell("late", "asleep", WakeFailed, "Still asleep, a retry may work: rank {rank}: Injected after restore"),
            *lost(),
        ),
    ),
    Row(
        "undo",
        *("asleep", "wake", "undo_restore"),
        (faulted("error", f"rolling back a wake failed: {INJECTED}"), *lost(late="hang")),
        others=("restore full",),
    ),
    Row(
        "verify",
        *("asleep", "wake", "verify"),
        (
            Cell("error", "asleep", WakeFailed, f"Still asleep, a retry may work: {INJECTED}"),
            Cell("wrong", "asleep", VerificationFailed, "extents of the weights differ"),
            *lost(),
        ),
    ),
    Row(
        "canary",
        *("asleep", "wake", "canary_agrees"),
        (
            Cell("error", "asleep", WakeFailed, f"Still asleep, a retry may work: {INJECTED}"),
            Cell("wrong", "asleep", VerificationFailed, "canary"),
            *lost(late="hang"),
        ),
    ),
    Row(
        "look which weights",
        *("asleep", "wake", "weights_source"),
        (
            Cell("error", "asleep", WakeFailed, f"Still asleep, a retry may work: {INJECTED}"),
            faulted("wrong", "the ranks have different weights"),
            *lost(),
        ),
    ),
    Row(
        "first step after a wake",
        *("asleep", "first step", "execute"),
        (
            Cell("error", "awake", BackendFailure, INJECTED, streams="failed"),
            Cell("unproven", "faulted", VerificationFailed, "rank {rank}: .*canary", streams="failed"),
            *lost(error=None),
        ),
    ),
    Row(
        "let the canary wait",
        *("asleep", "first step", "defer_canary"),
        (Cell("error", "asleep", WakeFailed, f"Still asleep, a retry may work: {INJECTED}"), *lost()),
    ),
    Row(
        "let it wait once more",
        *("asleep", "first step", "defer_canary"),
        (
            faulted("error", f"the wake cannot be proven: {INJECTED}", BackendFailure, streams="failed"),
            *lost(error=BackendFailure, streams="failed"),
        ),
        after=("execute error",),
    ),
    Row(
        "step",
        *("awake", "step", "execute"),
        (
            Cell("error", "awake", BackendFailure, INJECTED, streams="failed"),
            Cell("late", "awake", BackendFailure, "rank {rank}: Injected after execute", streams="failed"),
            Cell("bug", "awake", InternalError, "rank {rank}: .*Injected into execute", streams="failed"),
            *lost(error=None),
            faulted("hang", LATE, None),
        ),
    ),
    Row(
        "check an update",
        *("awake", "update", "check_update"),
        (Cell("error", "awake", BackendFailure, INJECTED), *lost()),
    ),
    Row(
        "write an update",
        *("awake", "update", "update_weights_from_file"),
        (
            faulted("error", f"some ranks have the new weights and some have not: {INJECTED}"),
            faulted("late", "some ranks have the new weights and some have not: rank {rank}: Injected after"),
            *lost(late="hang"),
        ),
    ),
    Row(
        "reload",
        *("awake", "reload", "reload_weights"),
        (faulted("error", f"some ranks have the new weights and some have not: {INJECTED}"), *lost()),
    ),
    Row(
        "start again",
        *("without a rank", "wake", "start"),
        (faulted("error", "recovering failed: rank {rank}: Injected into start"), *again()),
        dead=True,
    ),
    Row(
        "allocate",
        *("without a rank", "wake", "allocate_kv_cache"),
        (faulted("error", f"recovering failed: {INJECTED}"), *again(late="hang")),
        dead=True,
    ),
    Row(
        "meet again",
        *("without a rank", "wake", "join"),
        (faulted("error", f"recovering failed: {INJECTED}"), *again()),
    ),
    Row(
        "reset",
        *("without a rank", "wake", "reset"),
        (faulted("error", f"recovering failed: {INJECTED}"), *lost(late="hang")),
    ),
)

CELLS = [(row, cell) for row in ROWS for cell in row.cells]
