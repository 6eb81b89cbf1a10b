"""Runs a scheduler, or a rival, on a machine that only counts, through a trace; and says what it came to.

The scheduler is the one that serves, told the same events; only who carries out its actions is a fake.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import msgspec

from shuteye.errors import InvalidRequest
from shuteye.fleet.actions import Admit, AnyAction, Refuse, Sleep, Wake
from shuteye.fleet.events import AnyEvent, ModelAdded, RequestArrived, RequestFinished, Tick
from shuteye.fleet.machine import FakeMachine, ModelProfile
from shuteye.fleet.model_spec import Depth
from shuteye.fleet.trace import Arrival


class Policy(Protocol):
    """Who decides: `fleet/scheduler.py:Scheduler`, or a rival."""

    @property
    def next_tick_at(self) -> float | None:
        """When it wants to be told of time."""

    def handle(self, event: AnyEvent, now: float) -> tuple[AnyAction, ...]:
        """What is to be done now that `event` has happened."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a simulation came to.

    Attributes:
        steps: events that the policy was told.
        loads: wakes that were begun.
        evictions: models put to sleep from awake, whatever for.
        active_evictions: those of them that had requests running.
        killed: requests that ended by these.
        refused: requests that were answered 503.
        failed_loads: wakes for which the machine had not the memory.
        peak_bytes: the most that was resident, with transitions at their larger end.
        waits_s: how long admitted requests waited: half of them no longer than `p50`, and so on.
        loads_by_model: how often each was woken.
    """

    policy: str
    requests: int
    steps: int
    loads: int
    evictions: int
    active_evictions: int
    killed: int
    refused: int
    failed_loads: int
    budget_bytes: int
    peak_bytes: int
    waits_s: dict[str, float]
    loads_by_model: dict[str, int]


PERCENTILES = (50, 95, 99)


class Simulation:
    """One policy on one machine.

    Args:
        deadline_s: how long each request can wait.
    """

    def __init__(self, policy: Policy, machine: FakeMachine, *, deadline_s: float = 60.0) -> None:
        self._policy = policy
        self._machine = machine
        self._deadline_s = deadline_s
        self._coming: list[tuple[float, int, AnyEvent | str]] = []
        self._tokens: dict[str, int] = {}
        self._running: dict[str, dict[str, None]] = {name: {} for name in machine.profiles}
        self._model_of: dict[str, str] = {}
        self._sequence = 0
        self.now = 0.0
        self.waits: list[float] = []
        self.counts: Counter[str] = Counter()
        self.loads_by_model: Counter[str] = Counter()

    def run(self, trace: Iterable[Arrival]) -> None:
        """Go through `trace`, and on until everything has ended.

        Raises:
            InvalidRequest: the trace asks for a model that the machine has not.
        """
        for profile in self._machine.profiles.values():
            self._tell(ModelAdded(profile.spec(), Depth.UNLOADED, profile.bytes_at(Depth.UNLOADED)))
        for arrival in trace:
            self._pass_time(arrival.at)
            self._arrive(arrival)
        self._pass_time(None)

    def _arrive(self, arrival: Arrival) -> None:
        if arrival.model not in self._machine.profiles:
            raise InvalidRequest(f"The trace asks for {arrival.model!r}, which is none of the models.", param="models")
        self.counts["requests"] += 1
        request_id = str(self.counts["requests"])
        self._tokens[request_id] = arrival.tokens
        self._tell(RequestArrived(arrival.model, request_id, arrival.at + self._deadline_s))

    # --- time -----------------------------------------------------------------------------------

    def _pass_time(self, until: float | None) -> None:
        """Have everything happen that does before `until`; None: as long as requests run or wait."""
        while True:
            tick_at = self._policy.next_tick_at
            at = self._coming[0][0] if self._coming else None
            if until is None and not self._tokens and at is None:
                return
            if tick_at is not None and (at is None or tick_at < at):
                at = tick_at
            if at is None or (until is not None and at > until):
                break
            self.now = max(self.now, at)
            if self._coming and self._coming[0][0] <= self.now:
                self._happen(heapq.heappop(self._coming)[2])
            else:
                self._tell(Tick())
        if until is not None:
            self.now = max(self.now, until)

    def _happen(self, what: AnyEvent | str) -> None:
        """A transition of a model ends, or an event comes."""
        if isinstance(what, str):
            ended = self._machine.end(what)
            self.counts["failed_loads"] += not hasattr(ended, "seconds")
            self._tell(ended)
        elif not isinstance(what, RequestFinished) or what.request_id in self._model_of:
            self._tell(what)

    def _later(self, at: float, what: AnyEvent | str) -> None:
        self._sequence += 1
        heapq.heappush(self._coming, (at, self._sequence, what))

    # --- events and actions ---------------------------------------------------------------------

    def _tell(self, event: AnyEvent) -> None:
        if isinstance(event, RequestFinished):
            del self._running[self._model_of.pop(event.request_id)][event.request_id]
        self.counts["steps"] += 1
        for action in self._policy.handle(event, self.now):
            self._carry_out(action)

    def _carry_out(self, action: AnyAction) -> None:
        match action:
            case Admit():
                self._admit(action)
            case Refuse():
                del self._tokens[action.request_id]
                self.counts["refused"] += 1
            case Wake():
                self.counts["loads"] += 1
                self.loads_by_model[action.model] += 1
                self._later(self.now + self._machine.begin(action), action.model)
            case Sleep():
                self._sleep(action)

    def _admit(self, action: Admit) -> None:
        self.waits.append(action.waited_s)
        self._running[action.model][action.request_id] = None
        self._model_of[action.request_id] = action.model
        seconds = self._tokens.pop(action.request_id) / self._machine.profiles[action.model].tokens_per_s
        self._later(self.now + seconds, RequestFinished(action.request_id))

    def _sleep(self, action: Sleep) -> None:
        running = tuple(self._running[action.model])
        if self._machine.depth(action.model) is Depth.AWAKE:
            self.counts["evictions"] += 1
            self.counts["active_evictions"] += bool(running)
        self._later(self.now + self._machine.begin(action), action.model)
        self.counts["killed"] += len(running)
        for request_id in running:
            self._tell(RequestFinished(request_id))


# --- several machines, and what it came to ------------------------------------------------------


def place(models: Iterable[str], num_machines: int) -> dict[str, int]:
    """Which machine each model is on.

    By rendezvous hashing (Thaler and Ravishankar, 1998): one machine more takes only its share from each of the others.
    """
    return {model: max(range(num_machines), key=lambda machine: _weight(model, machine)) for model in models}


def _weight(model: str, machine: int) -> bytes:
    return hashlib.blake2b(f"{machine}/{model}".encode(), digest_size=8).digest()


def report_of(
    policy: str, simulations: Sequence[Simulation], budget_bytes: int, machines: Sequence[FakeMachine]
) -> Report:
    """What several machines came to together; bytes are those of the fullest."""
    counts: Counter[str] = Counter()
    loads: Counter[str] = Counter()
    for simulation in simulations:
        counts.update(simulation.counts)
        loads.update(simulation.loads_by_model)
    waits = sorted(wait for simulation in simulations for wait in simulation.waits)
    return Report(
        policy=policy,
        budget_bytes=budget_bytes,
        peak_bytes=max(machine.peak_bytes for machine in machines),
        waits_s={f"p{percent}": _percentile(waits, percent) for percent in PERCENTILES}
        | {"max": _percentile(waits, 100)},
        loads_by_model=dict(loads),
        **{name: counts[name] for name in _COUNTS},
    )


_COUNTS = ("requests", "steps", "loads", "evictions", "active_evictions", "killed", "refused", "failed_loads")


def _percentile(ordered: Sequence[float], percent: int) -> float:
    """The smallest value that `percent` of them do not exceed; 0 of none."""
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)] if ordered else 0.0


def simulate(
    name: str,
    policies: Sequence[Policy],
    profiles: Iterable[ModelProfile],
    trace: Iterable[Arrival],
    *,
    budget_bytes: int,
    deadline_s: float = 60.0,
) -> Report:
    """Go through `trace` with one machine for each of `policies`, each of `budget_bytes`.

    Raises:
        InvalidRequest: the trace asks for a model without a profile.
    """
    profiles = tuple(profiles)
    places = place((profile.name for profile in profiles), len(policies))
    machines = [
        FakeMachine([profile for profile in profiles if places[profile.name] == index], budget_bytes)
        for index in range(len(policies))
    ]
    simulations = [
        Simulation(policy, machine, deadline_s=deadline_s) for policy, machine in zip(policies, machines, strict=True)
    ]
    for simulation, part in zip(simulations, _parts(trace, places, len(policies)), strict=True):
        simulation.run(part)
    return report_of(name, simulations, budget_bytes, machines)


def _parts(trace: Iterable[Arrival], places: dict[str, int], num_machines: int) -> Iterator[Iterable[Arrival]]:
    """The part of `trace` that each machine gets; a model that is unknown goes to the first, which refuses it."""
    if num_machines == 1:
        yield trace
        return
    parts: list[list[Arrival]] = [[] for _ in range(num_machines)]
    for arrival in trace:
        parts[places.get(arrival.model, 0)].append(arrival)
    yield from parts
