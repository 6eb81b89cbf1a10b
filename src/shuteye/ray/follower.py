"""One replica's side of the control: comes up as is wanted, carries orders out, and catches up after being away.

Knows nothing of Ray, nor of engines: it is given a link to the control, and what carries out a call.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from shuteye.calls import Call
from shuteye.errors import ErrorInfo, ShuteyeError, info_of, refusal
from shuteye.ray.control import ControlLink, Look, Order
from shuteye.ray.fleet import Outcome
from shuteye.ray.wanted import AWAKE, calls_between

logger = logging.getLogger(__name__)

Apply = Callable[[Call[Any]], Awaitable[Any]]
"""Carries a call out on one replica; its report."""

AGAIN_S = 0.5
"""After the control could not be asked."""


class Follower:
    """Follows the control for as long as the replica lives.

    Args:
        name: the replica's, as callers are told it.
        apply: carries out one call; for a `Look`, the bytes of GET /state.

    Attributes:
        failure: why the replica is not what is wanted, although the control thinks so; it should be replaced.
    """

    def __init__(self, name: str, link: ControlLink, apply: Apply) -> None:
        self._name = name
        self._link = link
        self._apply = apply
        self._wanted = AWAKE
        self._turn = asyncio.Lock()
        self._up = asyncio.Event()
        self._following: asyncio.Task[None] | None = None
        self._working: set[asyncio.Task[None]] = set()
        self.failure: ShuteyeError | None = None

    async def start(self) -> None:
        """Come up as is wanted; the replica has just loaded its model, and must not serve before.

        Raises:
            ShuteyeError: it cannot be brought there.
        """
        self._wanted = await self._link.join(self._name, AWAKE)
        async with self._turn:
            self._following = asyncio.create_task(self._follow())
            for call in calls_between(AWAKE, self._wanted):
                await self._apply(call)
        self._up.set()

    async def stop(self) -> None:
        """Take no part any more."""
        tasks = [task for task in (self._following, *self._working) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(Exception):  # the control may be gone already; it notices by itself who has left
            await self._link.leave(self._name)

    async def _follow(self) -> None:
        while True:
            try:
                await self._ask_once()
            except Exception as error:  # noqa: BLE001 - whatever a link raises: the control is away and comes back
                logger.warning("The control cannot be asked (%s: %s).", type(error).__name__, error)
                await asyncio.sleep(AGAIN_S)

    async def _ask_once(self) -> None:
        told = await self._link.follow(self._name, self._wanted.revision)
        if told is None:
            present, self._wanted = self._wanted, await self._link.join(self._name, self._wanted)
            logger.info("Joined the control again.")
            self._begin(self._catch_up(calls_between(present, self._wanted)))
            return
        for order in told.orders:
            self._begin(self._carry_out(order))
        self._wanted = told.wanted

    def _begin(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._working.add(task)
        task.add_done_callback(self._working.discard)

    async def _catch_up(self, calls: Sequence[Call[Any]]) -> None:
        async with self._turn:
            try:
                for call in calls:
                    await self._apply(call)
                self.failure = None
            except ShuteyeError as error:
                logger.error("This replica cannot catch up with what is wanted: %s", error.message)  # noqa: TRY400
                self.failure = error

    async def _carry_out(self, order: Order) -> None:
        """Looks are answered at once, but never before the replica is up; other calls wait for the one before."""
        if isinstance(order.call, Look):
            await self._up.wait()
            outcome = await self._outcome(order.call)
        else:
            async with self._turn:
                outcome = await self._outcome(order.call)
        await self._report(order, outcome)

    async def _report(self, order: Order, outcome: Outcome) -> None:
        try:
            await self._link.report(order.number, outcome)
        except Exception as error:  # noqa: BLE001 - as in `_follow`; the control counts the replica as failed
            logger.warning("What %s led to cannot be reported (%s).", order.call.verb, error)

    async def _outcome(self, call: Call[Any]) -> Outcome:
        try:
            return Outcome(self._name, report=await self._apply(call))
        except Exception as error:  # noqa: BLE001 - a bug of ours is an answer, too
            return Outcome(self._name, error=_info(error, call))


def _info(error: Exception, call: Call[Any]) -> ErrorInfo:
    return info_of(refusal(error, f"The call to {call.verb}"))
