"""What replicas did, each and all together: reports summed, failures named, and their answers over HTTP. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import msgspec

from shuteye.errors import ClientError, EngineNotReady, ErrorInfo, ReplicasFailed, ShuteyeError, rebuild
from shuteye.ray.wanted import Wanted
from shuteye.state import TAGS, RanksDisagree, SleepReport, TagReport, WakeReport, sum_reports

VERIFIED_FROM_LEAST = ("off", "sample", "full")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one replica answered to one call: a report (None for calls that have none), or an error."""

    replica: str
    report: Any = None
    error: ErrorInfo | None = None


@dataclass(frozen=True, slots=True)
class FleetReport:
    """What all replicas answered to one call.

    Attributes:
        verb: the call's name.
        wanted: what replicas are to be from now on, also those that start later.
        outcomes: one for each replica that there was, those that failed included.
        seconds: from the call's turn to the last answer.
    """

    verb: str
    wanted: Wanted
    outcomes: tuple[Outcome, ...]
    seconds: float = 0.0

    @property
    def failed(self) -> tuple[Outcome, ...]:
        """Those of replicas that have not carried the call out."""
        return tuple(outcome for outcome in self.outcomes if outcome.error is not None)

    @property
    def failure(self) -> ShuteyeError | None:
        """What is to be raised: None if there were replicas and each has carried the call out."""
        if not self.outcomes:
            return EngineNotReady(
                f"No replica is running that could {self.verb}. It is noted: those that start will come up so."
            )
        if not self.failed:
            return None
        return self._refusal() or self._partial_failure()

    def _refusal(self) -> ShuteyeError | None:
        """The caller's mistake, if every replica says that it is one, as a single server would say it."""
        errors = [rebuild(error.kind, error.message, error.param) for error in self._errors]
        refused = len(errors) == len(self.outcomes) and len({type(error) for error in errors}) == 1
        return errors[0] if refused and isinstance(errors[0], ClientError) else None

    @property
    def _errors(self) -> list[ErrorInfo]:
        return [outcome.error for outcome in self.outcomes if outcome.error is not None]

    def _partial_failure(self) -> ReplicasFailed:
        causes = "; ".join(
            f"replica {outcome.replica}: {outcome.error.kind}: {outcome.error.message}"
            for outcome in self.failed
            if outcome.error is not None
        )
        return ReplicasFailed(
            f"{len(self.failed)} of {len(self.outcomes)} replicas failed to {self.verb}: {causes} "
            "Those that did it stay so; call again for the others."
        )

    @property
    def summed(self) -> SleepReport | WakeReport | None:
        """The reports of those that succeeded as one, with the bytes of all and the seconds of the slowest."""
        reports = [outcome.report for outcome in self.outcomes if outcome.error is None]
        sleeps = [report for report in reports if isinstance(report, SleepReport)]
        wakes = [report for report in reports if isinstance(report, WakeReport)]
        if sleeps:
            return _summed_sleep(sleeps)
        return _summed_wake(wakes) if wakes else None


def _summed_sleep(reports: Sequence[SleepReport]) -> SleepReport:
    return SleepReport(
        changed=any(report.changed for report in reports),
        level=max(report.level for report in reports),
        tags=_summed_tags([report.tags for report in reports]),
        freed_bytes=sum(report.freed_bytes for report in reports),
        residual_bytes=sum(report.residual_bytes for report in reports),
        seconds=max(report.seconds for report in reports),
        aborted_requests=sum(report.aborted_requests for report in reports),
        held_requests=sum(report.held_requests for report in reports),
        ranks=tuple(rank for report in reports for rank in report.ranks),
    )


def _summed_wake(reports: Sequence[WakeReport]) -> WakeReport:
    moved = [report for report in reports if report.changed] or reports
    sources = {report.weights_source for report in moved}
    return WakeReport(
        changed=any(report.changed for report in reports),
        tags=_summed_tags([report.tags for report in reports]),
        restored_bytes=sum(report.restored_bytes for report in reports),
        verified=min((report.verified for report in moved), key=VERIFIED_FROM_LEAST.index),
        verified_bytes=sum(report.verified_bytes for report in reports),
        canary=all(report.canary for report in moved),
        weights_source=sources.pop() if len(sources) == 1 else None,
        missing=tuple(dict.fromkeys(name for report in reports for name in report.missing)),
        updates_lost=any(report.updates_lost for report in reports),
        ranks=tuple(rank for report in reports for rank in report.ranks),
        seconds=max(report.seconds for report in reports),
    )


def _summed_tags(reports: Sequence[Sequence[TagReport]]) -> tuple[TagReport, ...]:
    """One report a tag; of replicas that ended differently, that of the first which is not resident."""
    summed = []
    for tag in TAGS:
        of_tag = [report for tags in reports for report in tags if report.tag == tag]
        if of_tag:
            summed.append(_summed_tag(of_tag))
    return tuple(summed)


def _summed_tag(reports: Sequence[TagReport]) -> TagReport:
    try:
        return sum_reports(reports)
    except RanksDisagree:
        away = next(report.residency for report in reports if report.residency != "resident")
        return sum_reports([replace(report, residency=away) for report in reports])


# --- states -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FleetState:
    """What replicas say of themselves.

    Attributes:
        states: the answer of GET /state of each replica that answered, by its name.
        failed: those that did not answer, and why.
    """

    wanted: Wanted
    states: Mapping[str, Mapping[str, Any]]
    failed: tuple[Outcome, ...] = ()

    @property
    def sleeping(self) -> tuple[str, ...]:
        """Replicas of which some memory is away."""
        return tuple(name for name, state in self.states.items() if state["is_sleeping"])

    @property
    def paused(self) -> tuple[str, ...]:
        """Replicas on which a pause is in force."""
        return tuple(name for name, state in self.states.items() if state["is_paused"])

    def require_any(self) -> FleetState:
        """This, if any replica has answered.

        Raises:
            EngineNotReady: nobody can say what is so.
        """
        if not self.states:
            raise EngineNotReady("No replica answers: none is running, or none is well. GET /state may tell more.")
        return self

    @property
    def answer(self) -> dict[str, Any]:
        """GET /state: a single server's fields, summed over replicas, then what is wanted and each replica's own."""
        own = {"wanted": msgspec.to_builtins(self.wanted), "replicas": self.states, "failed": self.failed}
        if not self.states:
            return own
        states = list(self.states.values())
        return {
            **states[0],
            "status": _first_other_than("ready", [state["status"] for state in states]),
            "failure": next((state["failure"] for state in states if state["failure"]), None),
            "is_sleeping": bool(self.sleeping),
            "is_paused": bool(self.paused),
            "ready": any(state["ready"] for state in states),
            "state": _summed_state([state["state"] for state in states]),
            "waking": _summed_waking([state["waking"] for state in states]),
            "stats": _summed([state["stats"] for state in states]),
            **own,
        }


def _first_other_than(usual: str, found: Sequence[str]) -> str:
    return next((value for value in found if value != usual), usual)


def _summed(each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = dict.fromkeys(name for one in each for name in one)
    return {name: _sum([one[name] for one in each if name in one]) for name in names}


def _sum(values: Sequence[Any]) -> Any:
    """Of numbers, of lists of them place by place, or of what has such by name."""
    if isinstance(values[0], Mapping):
        return _summed(values)
    if isinstance(values[0], list):
        return [sum(column) for column in zip_longest(*values, fillvalue=0)]
    return sum(values)


def _summed_state(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Bytes are sums; for the rest, what keeps the first replica that does not serve from serving."""
    closed = next((state for state in states if state["gate"] != "open"), states[0])
    tags = [_summed_tag_state(states, tag) for tag in closed["tags"]]
    return {**closed, "tags": tags, "ranks": [rank for state in states for rank in state["ranks"]]}


def _summed_tag_state(states: Sequence[Mapping[str, Any]], tag: Mapping[str, Any]) -> dict[str, Any]:
    of_tag = [one for state in states for one in state["tags"] if one["tag"] == tag["tag"]]
    return {**tag, **{name: sum(one[name] for one in of_tag) for name in ("nbytes", "resident_bytes")}}


def _summed_waking(costs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Replicas wake side by side: bytes are sums, seconds those of the slowest."""
    slowest = {
        name: max((cost[name] for cost in costs if cost[name] is not None), default=None)
        for name in ("last_wake_s", "expected_s")
    }
    return {
        "restore_bytes": sum(cost["restore_bytes"] for cost in costs),
        "tags": _summed([cost["tags"] for cost in costs]),
        "backings": {tag: backing for cost in costs for tag, backing in cost["backings"].items()},
        **slowest,
    }
