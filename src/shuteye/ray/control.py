"""The one handle: knows what all replicas of an application should be, and has each of them carry out every call.

Knows nothing of Ray. Replicas ask (`join`, `follow`, `report`) and are never called, so that one which starts, restarts
or was away for a while is brought to what is wanted in the same way as the others.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

import msgspec

from shuteye.calls import Call, PauseCall, ResetPrefixCacheCall, ResumeCall, SleepCall, WakeCall
from shuteye.errors import EngineDead, EngineHung, InvalidRequest, info_of
from shuteye.ray.fleet import FleetReport, FleetState, Outcome
from shuteye.ray.wanted import AWAKE, Wanted, after

R = TypeVar("R")

logger = logging.getLogger(__name__)

POLL_S = 2.0
"""How long a replica's question waits for something to do."""
LEASE_S = 10.0
"""A replica that has not asked for so long is taken for gone; one that is not joins again, and catches up."""
LOOK_S = 0.2
CALL_TIMEOUT_S = 600.0
LOOK_TIMEOUT_S = 5.0

FLEET_CALLS = (SleepCall, WakeCall, PauseCall, ResumeCall, ResetPrefixCacheCall)
"""What may be asked of all replicas."""


class Look(Call[bytes], frozen=True, tag="look"):
    """Ask a replica for its GET /state; answered at once, whatever else it does."""

    verb: ClassVar[str] = "look"


@dataclass(frozen=True, slots=True)
class Order:
    """A call that a replica is to carry out."""

    number: int
    call: Call[Any]


@dataclass(frozen=True, slots=True)
class Orders:
    """The answer to `follow`: what to do now, and what will have been asked for once that is done."""

    orders: tuple[Order, ...]
    wanted: Wanted


class ControlLink(Protocol):
    """What a replica asks of the control, wherever that runs."""

    async def join(self, replica: str, known: Wanted) -> Wanted:
        """See `SleepControl.join`."""

    async def follow(self, replica: str, revision: int) -> Orders | None:
        """See `SleepControl.follow`."""

    async def report(self, number: int, outcome: Outcome) -> None:
        """See `SleepControl.report`."""

    async def leave(self, replica: str) -> None:
        """See `SleepControl.leave`."""


@dataclass(slots=True)
class _Member:
    """A replica that has joined."""

    name: str
    asked_at: float  # monotonic
    orders: list[Order] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    pending: dict[int, asyncio.Future[Outcome]] = field(default_factory=dict)

    def give(self, order: Order) -> asyncio.Future[Outcome]:
        """Have it carry out `order` as soon as it asks; the future is its answer."""
        answer: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self.pending[order.number] = answer
        self.orders.append(order)
        self.news.set()
        return answer

    def settle(self, error: EngineDead | EngineHung) -> None:
        """Answer in its place what it has not answered."""
        for answer in self.pending.values():
            if not answer.done():
                answer.set_result(Outcome(self.name, error=info_of(error)))
        self.pending.clear()


class SleepControl:
    """Carries out calls on all replicas, one call after the other, and keeps what they lead to.

    A call changes what is wanted if at least one replica carried it out, or if there is none.

    Args:
        call_timeout_s: a replica that has not answered for so long has failed the call.
        lease_s: see `LEASE_S`.
    """

    def __init__(self, *, call_timeout_s: float = CALL_TIMEOUT_S, lease_s: float = LEASE_S) -> None:
        self._call_timeout_s = call_timeout_s
        self._lease_s = lease_s
        self._wanted = AWAKE
        self._members: dict[str, _Member] = {}
        self._numbers = itertools.count(1)
        self._turn = asyncio.Lock()
        self._running: set[asyncio.Task[Any]] = set()

    # --- for replicas ---------------------------------------------------------------------------

    async def join(self, replica: str, known: Wanted) -> Wanted:
        """Take part from now on; answers what the replica must be before it serves.

        Waits for a call that is being carried out, so that nobody comes up in a state that is just being left.

        Args:
            known: what was wanted when the replica last heard of it. After a restart of the control it may be all
                that is left of what callers asked for.
        """
        async with self._turn:
            if known.revision > self._wanted.revision:
                self._wanted = known
                self._let_all_join_again()
            self._members[replica] = _Member(replica, time.monotonic())
            return self._wanted

    def _let_all_join_again(self) -> None:
        """They came up before it was known what is wanted, and are told it when they join again."""
        for name in list(self._members):
            self._drop(name, "had to catch up with what is wanted")

    async def follow(self, replica: str, revision: int) -> Orders | None:
        """Wait up to `POLL_S` for something to do; None tells to join again.

        Args:
            revision: of what the replica knows to be wanted.
        """
        member = self._members.get(replica)
        if member is None:
            return None
        member.asked_at = time.monotonic()
        if not member.orders and revision == self._wanted.revision:
            await _set_within(member.news, POLL_S)
        if self._members.get(replica) is not member:
            return None
        member.news.clear()
        orders, member.orders = tuple(member.orders), []
        return Orders(orders, self._wanted)

    async def report(self, number: int, outcome: Outcome) -> None:
        """Answer an order; nobody may wait for the answer any more."""
        member = self._members.get(outcome.replica)
        answer = member.pending.pop(number, None) if member is not None else None
        if answer is not None and not answer.done():
            answer.set_result(outcome)

    async def leave(self, replica: str) -> None:
        """Take no part any more: the replica is about to end."""
        self._drop(replica, "ended")

    def _drop(self, name: str, why: str) -> None:
        member = self._members.pop(name, None)
        if member is not None:
            member.settle(EngineDead(f"The replica {why} before it had answered."))
            member.news.set()

    def _drop_the_gone(self) -> None:
        now = time.monotonic()
        for name in [name for name, one in self._members.items() if now - one.asked_at > self._lease_s]:
            logger.warning("Replica %s has not asked for %g s and is taken for gone.", name, self._lease_s)
            self._drop(name, f"has given no sign of life for {self._lease_s:g} s and is taken for gone")

    # --- for callers ----------------------------------------------------------------------------

    async def carry_out(self, call: Call[Any]) -> FleetReport:
        """Have every replica carry out `call`, and gather what each of them answers, failures included.

        Goes on to its end when whoever called has gone.

        Raises:
            InvalidRequest: it is no call for all replicas, or has a level, tags or a mode that there is not.
        """
        if not isinstance(call, FLEET_CALLS):
            verbs = ", ".join(sorted(kind.verb for kind in FLEET_CALLS))
            raise InvalidRequest(f"Replicas can together {verbs}; not {type(call).__name__}.")
        after(self._wanted, call)  # refuses what no replica could do
        return await self._to_its_end(self._carry_out(call))

    async def _carry_out(self, call: Call[Any]) -> FleetReport:
        async with self._turn:
            began = time.monotonic()
            outcomes = await self._ask(self._members.values(), call, self._call_timeout_s)
            if not outcomes or any(outcome.error is None for outcome in outcomes):
                self._wanted = after(self._wanted, call)
                self._tell_all()
            return FleetReport(call.verb, self._wanted, outcomes, time.monotonic() - began)

    def _tell_all(self) -> None:
        for member in self._members.values():
            member.news.set()

    async def _to_its_end(self, work: Awaitable[R]) -> R:
        task = asyncio.ensure_future(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return await asyncio.shield(task)

    async def _ask(self, members: Iterable[_Member], call: Call[Any], timeout_s: float) -> tuple[Outcome, ...]:
        self._drop_the_gone()
        order = Order(next(self._numbers), call)
        asked = {member.name: member.give(order) for member in members}
        deadline = time.monotonic() + timeout_s
        waiting: set[asyncio.Future[Outcome]] = set(asked.values())
        while waiting and time.monotonic() < deadline:
            _, waiting = await asyncio.wait(waiting, timeout=LOOK_S)
            self._drop_the_gone()
        late = EngineHung(f"The replica has not answered for {timeout_s:g} s; it may still do it.")
        return tuple(
            answer.result() if answer.done() else Outcome(name, error=info_of(late)) for name, answer in asked.items()
        )

    async def look(self) -> FleetState:
        """What all replicas are now, while calls go on."""
        outcomes = await self._ask(self._members.values(), Look(), LOOK_TIMEOUT_S)
        states = {one.replica: msgspec.json.decode(one.report) for one in outcomes if one.error is None}
        return FleetState(self._wanted, states, tuple(one for one in outcomes if one.error is not None))

    # --- calls as methods, which raise ----------------------------------------------------------

    async def sleep(
        self, level: int = 1, *, mode: str | None = None, tags: Any = None, timeout_s: float | None = None
    ) -> FleetReport:
        """Put every replica to sleep; see `shuteye.calls.SleepCall`.

        Raises:
            ReplicasFailed: some did not; the message names each with its reason. The others sleep.
            ClientError: all of them refused it, such as TransitionConflict.
            EngineNotReady: there is no replica; those that start will come up asleep.
        """
        return await self._done(SleepCall(level, mode, tags, timeout_s))

    async def wake_up(self, *, tags: Any = None) -> FleetReport:
        """Wake every replica; raises as `sleep`."""
        return await self._done(WakeCall(tags))

    async def pause(self, mode: str | None = None, timeout_s: float | None = None) -> FleetReport:
        """Close the gate of every replica; raises as `sleep`."""
        return await self._done(PauseCall(mode, timeout_s))

    async def resume(self) -> FleetReport:
        """Lift the pause of every replica; raises as `sleep`."""
        return await self._done(ResumeCall())

    async def reset_prefix_cache(self) -> FleetReport:
        """Have every replica forget all cached prefixes; raises as `sleep`."""
        return await self._done(ResetPrefixCacheCall())

    async def _done(self, call: Call[Any]) -> FleetReport:
        report = await self.carry_out(call)
        failure = report.failure
        if failure is not None:
            raise failure
        return report

    async def state(self) -> dict[str, Any]:
        """The answer of GET /state: what is wanted, what each replica is, a single server's fields summed over them."""
        answer: dict[str, Any] = msgspec.json.decode(msgspec.json.encode((await self.look()).answer))
        return answer

    async def is_sleeping(self) -> bool:
        """True until every replica that answers has every tag in memory.

        Raises:
            EngineNotReady: none answers.
        """
        return bool((await self.look()).require_any().sleeping)

    async def is_paused(self) -> bool:
        """True while a pause is in force on any replica; raises as `is_sleeping`."""
        return bool((await self.look()).require_any().paused)


async def _set_within(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return
