"""Carries out what the fleet's scheduler decides: wakes and sleeps of engines, answers to those who wait.

Knows nothing of how it is decided (`shuteye.fleet`), nor of what a request is.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Protocol
from uuid import uuid4

from shuteye.errors import (
    ModelNotFound,
    ModelPaused,
    ModelSleeping,
    QueueFull,
    ServerStopping,
    ShuteyeError,
    WakeFailed,
)
from shuteye.fleet import events
from shuteye.fleet.actions import (
    Admit,
    AnyAction,
    EndLease,
    GrantLease,
    Refusal,
    Refuse,
    RefuseLease,
    Sleep,
    Wake,
)
from shuteye.fleet.model_spec import Depth, ModelSpec, SleepOwner
from shuteye.fleet.scheduler import Scheduler
from shuteye.fleet.status import LeaseStatus, ModelStatus, RoomStatus
from shuteye.memory.limits import available_bytes

logger = logging.getLogger(__name__)

MEASURE_EVERY_S = 1.0

_REFUSALS: dict[Refusal, Callable[[str], ShuteyeError]] = {
    Refusal.DEADLINE: ModelSleeping,
    Refusal.QUEUE_FULL: QueueFull,
    Refusal.NO_ROOM: QueueFull,
    Refusal.SLEEPING: lambda _detail: ModelSleeping(),
    Refusal.LEASED: ModelSleeping,
    Refusal.PAUSED: lambda _detail: ModelPaused(),
    Refusal.WAKE_FAILED: WakeFailed,
    Refusal.REMOVED: ModelNotFound,
}


def machine_bytes() -> int:
    """What the machine, and the control groups of this process, could still give."""
    return available_bytes()


class DrivenModel(Protocol):
    """A model as the driver moves it."""

    async def go_awake(self) -> None:
        """Wake, from whatever depth.

        Raises:
            ShuteyeError: it is where it was.
        """
        ...

    async def go_to_sleep(self, depth: Depth) -> None:
        """Sleep, or sleep more deeply.

        Raises:
            ShuteyeError: it is where it was.
        """
        ...

    async def resident_bytes(self) -> int:
        """What it takes of memory that it shares with no other, by the system's account; takes some milliseconds."""
        ...

    def woken_bytes(self) -> int:
        """The same right after a wake, as far as it is known without looking again."""
        ...

    def on_moved(self) -> None:
        """A transition has ended, and the scheduler knows of it."""
        ...


class FleetDriver:
    """One scheduler and the models that it moves, on one event loop.

    Args:
        scheduler: told of everything, and asked at the times that it wants.
        clock: seconds that never go back.
    """

    def __init__(self, scheduler: Scheduler, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._models: dict[str, DrivenModel] = {}
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._claims: dict[str, asyncio.Future[GrantLease | RefuseLease]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._numbers = itertools.count(1)
        self._closed = False

    # --- models ---------------------------------------------------------------------------------

    def add(self, spec: ModelSpec, model: DrivenModel) -> None:
        """There is one more model, which is unloaded.

        Raises:
            InvalidRequest: there is one of that name.
        """
        self.tell(events.ModelAdded(spec, Depth.UNLOADED, 0))
        self._models[spec.name] = model

    async def run(self) -> None:
        """Measure what models take and what the machine has left, until cancelled."""
        while True:
            await asyncio.sleep(MEASURE_EVERY_S)
            for name, model in self._models.items():
                self.tell(events.ResidentMeasured(name, await model.resident_bytes()))
            self.tell(events.AvailableMeasured(available_bytes()))

    def lose(self, model: str) -> None:
        """The process of a model has ended by itself."""
        logger.warning("The process of %r has ended by itself; the next request starts another.", model)
        self.tell(events.ModelLost(model))

    def close(self) -> None:
        """Carry out nothing more; whoever waits is refused."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(ModelSleeping())
        for claim in self._claims.values():
            if not claim.done():
                claim.set_exception(ServerStopping("This server is stopping; it lends no memory."))

    # --- requests -------------------------------------------------------------------------------

    @asynccontextmanager
    async def place(self, model: str, *, within_s: float) -> AsyncIterator[None]:
        """For as long as this lasts the model is awake; first waits until it is.

        Raises:
            ShuteyeError: it is not to be had within that time, or not at all.
        """
        request_id = str(next(self._numbers))
        arrived = events.RequestArrived(model, request_id, self._clock() + within_s)
        await self._admitted(request_id, arrived)
        try:
            yield
        finally:
            if not self._closed:
                self.tell(events.RequestFinished(request_id))

    async def wake(self, model: str, *, within_s: float) -> None:
        """Wake a model whoever put it to sleep.

        Raises:
            ShuteyeError: as `place`.
        """
        request_id = str(next(self._numbers))
        await self._admitted(request_id, events.WakeAsked(model, request_id, self._clock() + within_s))

    async def _admitted(self, request_id: str, event: events.RequestArrived | events.WakeAsked) -> None:
        self._waiting[request_id] = future = asyncio.get_running_loop().create_future()
        try:
            self.tell(event)
            await future
        except asyncio.CancelledError:  # its client has gone, while it was held or just after
            if not self._closed and not _is_over(future, event):
                self.tell(events.RequestFinished(request_id))
            raise
        finally:
            self._waiting.pop(request_id, None)

    # --- leases ---------------------------------------------------------------------------------

    @staticmethod
    def new_lease_id() -> str:
        """One that nobody else has, or can guess."""
        return f"lease-{uuid4().hex}"

    async def claim(self, claim: events.LeaseClaimed) -> GrantLease | RefuseLease:
        """Lend memory of the budget, or say what stands in the way; withdrawn if it is cancelled while it waits.

        Raises:
            InvalidRequest, ModelNotFound: it asks for what cannot be.
        """
        answer: asyncio.Future[GrantLease | RefuseLease] = asyncio.get_running_loop().create_future()
        self._claims[claim.lease_id] = answer
        try:
            self.tell(claim)
            return await answer
        except asyncio.CancelledError:
            if not self._closed and not claim.dry_run and not _is_refused(answer):
                self.tell(events.LeaseReleased(claim.lease_id))
            raise
        finally:
            self._claims.pop(claim.lease_id, None)

    def renew(self, lease_id: str, ttl_s: float) -> None:
        """Have a lease last `ttl_s` from now on.

        Raises:
            LeaseGone: it is over.
        """
        self.tell(events.LeaseRenewed(lease_id, ttl_s))

    def release(self, lease_id: str) -> None:
        """End a lease, and wake what slept for it.

        Raises:
            LeaseGone: it is over.
        """
        self.tell(events.LeaseReleased(lease_id))

    def leases(self) -> tuple[LeaseStatus, ...]:
        """What the scheduler says of all leases and claims."""
        return self._scheduler.leases()

    # --- the scheduler --------------------------------------------------------------------------

    def tell(self, event: events.AnyEvent) -> tuple[AnyAction, ...]:
        """Tell the scheduler, and carry out what it then wants; what that is.

        Raises:
            ShuteyeError: the event is refused, as its class says.
        """
        actions = self._scheduler.handle(event, self._clock())
        for action in actions:
            self._carry_out(action)
        self._set_timer()
        return actions

    def status(self, model: str) -> ModelStatus:
        """What the scheduler says of a model."""
        return self._scheduler.model(model)

    def room(self) -> RoomStatus:
        """What the scheduler says of the budget."""
        return self._scheduler.room()

    def models(self) -> tuple[ModelStatus, ...]:
        """What the scheduler says of all models."""
        return self._scheduler.models()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        at = self._scheduler.next_tick_at
        if at is not None and at < math.inf and not self._closed:
            delay_s = max(0.0, at - self._clock())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self.tell, events.Tick())

    def _carry_out(self, action: AnyAction) -> None:
        match action:
            case Wake(model):
                self._begin(model, self._wake(self._models[model]))
            case Sleep(model, depth, owner):
                if owner is not SleepOwner.OPERATOR:
                    logger.info("%r goes to sleep (%s): %s.", model, depth.name.lower(), owner.value)
                self._begin(model, self._sleep(self._models[model], depth))
            case GrantLease(lease_id) | RefuseLease(lease_id):
                answer = self._claims.get(lease_id)
                if answer is not None and not answer.done():
                    answer.set_result(action)
            case EndLease(lease_id, expired):
                if expired:
                    logger.warning("%s was not renewed in time, and is over.", lease_id)
            case Admit(request_id):
                self._answer(request_id, None)
            case Refuse(request_id, _model, why, _retry_after_s, detail):
                self._answer(request_id, _REFUSALS[why](detail))

    def _answer(self, request_id: str, error: ShuteyeError | None) -> None:
        future = self._waiting.get(request_id)
        if future is None or future.done():
            return
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    @staticmethod
    async def _wake(model: DrivenModel) -> int:
        await model.go_awake()
        return model.woken_bytes()  # whoever waits need not wait for a closer look, which `run` takes soon

    @staticmethod
    async def _sleep(model: DrivenModel, depth: Depth) -> int:
        await model.go_to_sleep(depth)
        return await model.resident_bytes()

    def _begin(self, model: str, work: Awaitable[int]) -> None:
        task = asyncio.get_running_loop().create_task(self._finish(model, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _finish(self, model: str, work: Awaitable[int]) -> None:
        """Tell how a transition ended; `work` returns what the model then takes."""
        began = self._clock()
        try:
            resident = await work
        except ShuteyeError as error:
            logger.warning("%r stays where it is: %s", model, error.message)
            ended: events.TransitionEvent = events.TransitionFailed(model, error.message)
        except Exception:
            logger.exception("%r could not be moved because of a bug of ours.", model)
            ended = events.TransitionFailed(model, "a bug of ours; the server's log has the traceback")
        else:
            ended = events.TransitionFinished(model, resident, self._clock() - began)
        if self.status(model).phase.in_transition:  # its process may have ended meanwhile, and been told as lost
            self.tell(ended)
        self._models[model].on_moved()


def _is_refused(answer: asyncio.Future[GrantLease | RefuseLease]) -> bool:
    return answer.done() and not answer.cancelled() and isinstance(answer.result(), RefuseLease)


def _is_over(answer: asyncio.Future[None], event: events.RequestArrived | events.WakeAsked) -> bool:
    """Whether the scheduler has nothing more of a request: it was refused, or is a wake that was admitted."""
    if answer.cancelled() or not answer.done():
        return False
    return answer.exception() is not None or isinstance(event, events.WakeAsked)
