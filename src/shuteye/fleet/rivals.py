"""What others do: rules by which a model is chosen to make room, each as its source has it. For simulations only.

All of them load by request, unload one model after the other until there is room, and keep requests in one queue. They
differ in when there is room, in who goes, and in whether that one may be in use.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

from shuteye.errors import InternalError
from shuteye.fleet import events
from shuteye.fleet.actions import Admit, AnyAction, Refusal, Refuse, Sleep, Wake
from shuteye.fleet.model_spec import Depth, ModelSpec, SleepOwner
from shuteye.fleet.phases import Move, Phase, after
from shuteye.fleet.timers import Due, Timers


@dataclass(slots=True)
class Loaded:
    """A model as rivals see it."""

    spec: ModelSpec
    phase: Phase = Phase.ASLEEP
    running: int = 0
    waiting: int = 0
    last_used: float = 0.0
    uses: int = 0

    @property
    def nbytes(self) -> int:
        """What it takes while it is not unloaded."""
        return self.spec.awake_bytes + self.spec.growth_bytes

    @property
    def is_idle(self) -> bool:
        """Loaded, and nobody needs it."""
        return self.phase is Phase.AWAKE and not self.running and not self.waiting


@dataclass(frozen=True, slots=True)
class _Queued:
    request_id: str
    model: Loaded
    arrived: float


class Rival:
    """What all rules have in common; one that loads and unloads, but does not choose.

    Args:
        budget_bytes: what models may take together, for those who ask.
    """

    name = "rival"
    queue_blocks = False
    """Whether a request that waits for room keeps those behind it waiting, also for models that are loaded."""

    idle_s: float | None = None
    """Seconds without a request after which a model is unloaded."""

    models_max: float = math.inf
    """How many models are loaded at most, if they are counted."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.models: dict[str, Loaded] = {}
        self._queue: deque[_Queued] = deque()
        self._running: dict[str, Loaded] = {}
        self._timers = Timers()
        self._actions: list[AnyAction] = []
        self._now = 0.0

    # --- the rule -------------------------------------------------------------------------------

    def has_room(self, model: Loaded) -> bool:
        """Whether `model` may be loaded now."""
        raise NotImplementedError

    def victim(self, candidates: list[Loaded]) -> Loaded | None:
        """Which of those that are loaded and idle goes; None if none does."""
        raise NotImplementedError

    def candidates(self) -> list[Loaded]:
        """The models that may be unloaded to make room."""
        return [model for model in self.resident() if model.is_idle]

    def resident(self) -> Iterable[Loaded]:
        """Models that are loaded, or on their way in or out."""
        return (model for model in self.models.values() if model.phase is not Phase.ASLEEP)

    # --- events ---------------------------------------------------------------------------------

    @property
    def next_tick_at(self) -> float | None:
        """When the next deadline or idle time is over."""
        return self._timers.next_at

    def handle(self, event: events.AnyEvent, now: float) -> tuple[AnyAction, ...]:
        """What is to be done now that `event` has happened.

        Raises:
            InternalError: rivals know no such event.
        """
        self._now = now
        match event:
            case events.ModelAdded(spec=spec):
                self.models[spec.name] = Loaded(spec)
            case events.RequestArrived():
                self._arrive(event)
            case events.RequestFinished(request_id=request_id):
                self._finish(request_id)
            case events.TransitionFinished(model=name):
                self._move(self.models[name], Move.FINISH)
            case events.TransitionFailed(model=name):
                self._fail(self.models[name])
            case events.Tick():
                pass
            case _:
                raise InternalError(f"{self.name} knows no {type(event).__name__}.")
        self._pass_time()
        self._serve_queue()
        actions, self._actions = tuple(self._actions), []
        return actions

    def _arrive(self, event: events.RequestArrived) -> None:
        model = self.models[event.model]
        model.last_used, model.uses, model.waiting = self._now, model.uses + 1, model.waiting + 1
        self._queue.append(_Queued(event.request_id, model, self._now))
        self._timers.set((Due.DEADLINE, event.request_id), event.deadline)
        self._timers.cancel((Due.IDLE, event.model))

    def _finish(self, request_id: str) -> None:
        model = self._running.pop(request_id)
        model.running -= 1
        model.last_used = self._now
        if self.idle_s is not None and model.is_idle:
            self._timers.set((Due.IDLE, model.spec.name), self._now + self.idle_s)

    def _fail(self, model: Loaded) -> None:
        waking = model.phase is Phase.WAKING
        self._move(model, Move.FAIL)
        if waking:
            for queued in [one for one in self._queue if one.model is model]:
                self._refuse(queued, Refusal.WAKE_FAILED)

    def _pass_time(self) -> None:
        for due, key in self._timers.due(self._now):
            if due is Due.DEADLINE:
                self._refuse(next(one for one in self._queue if one.request_id == key), Refusal.DEADLINE)
            elif self.models[key].is_idle:
                self._unload(self.models[key])

    def _refuse(self, queued: _Queued, why: Refusal) -> None:
        self._queue.remove(queued)
        queued.model.waiting -= 1
        self._timers.cancel((Due.DEADLINE, queued.request_id))
        self._actions.append(Refuse(queued.request_id, queued.model.spec.name, why, None, ""))

    # --- the queue ------------------------------------------------------------------------------

    def _serve_queue(self) -> None:
        left: deque[_Queued] = deque()
        asked: set[str] = set()
        while self._queue:
            queued = self._queue.popleft()
            if queued.model.phase is Phase.AWAKE:
                self._admit(queued)
                continue
            left.append(queued)
            if queued.model.spec.name not in asked:
                asked.add(queued.model.spec.name)
                self._make_room(queued.model)
            if self.queue_blocks:
                break
        left.extend(self._queue)
        self._queue = left

    def _admit(self, queued: _Queued) -> None:
        model = queued.model
        model.waiting -= 1
        model.running += 1
        self._running[queued.request_id] = model
        self._timers.cancel((Due.DEADLINE, queued.request_id))
        self._actions.append(Admit(queued.request_id, model.spec.name, self._now - queued.arrived))

    def _make_room(self, model: Loaded) -> None:
        """Load `model` if there is room; else unload one, and look again once that is done."""
        if model.phase is not Phase.ASLEEP:
            return
        if self.has_room(model):
            self._move(model, Move.WAKE)
            self._actions.append(Wake(model.spec.name, Depth.LEVEL_1))
        elif not any(other.phase is Phase.FALLING_ASLEEP for other in self.resident()):
            victim = self.victim(self.candidates())
            if victim is not None:
                self._unload(victim)

    def _unload(self, model: Loaded) -> None:
        self._timers.cancel((Due.IDLE, model.spec.name))
        self._move(model, Move.SLEEP)
        self._actions.append(Sleep(model.spec.name, Depth.LEVEL_1, SleepOwner.FLEET))

    @staticmethod
    def _move(model: Loaded, move: Move) -> None:
        model.phase = after(model.phase, move, model=model.spec.name)

    def taken_bytes(self) -> int:
        """What models take that are not unloaded."""
        return sum(model.nbytes for model in self.resident())


class Lru(Rival):
    """The model that was used longest ago goes, if it is idle, until the bytes suffice. The textbook's rule."""

    name = "lru"

    def has_room(self, model: Loaded) -> bool:
        """By bytes."""
        return self.taken_bytes() + model.nbytes <= self.budget_bytes

    def victim(self, candidates: list[Loaded]) -> Loaded | None:
        """The one used longest ago."""
        return min(candidates, key=lambda model: model.last_used, default=None)


class Lfu(Lru):
    """The model with the fewest requests so far goes, if it is idle, until the bytes suffice. The textbook's rule."""

    name = "lfu"

    def victim(self, candidates: list[Loaded]) -> Loaded | None:
        """The one used least often."""
        return min(candidates, key=lambda model: (model.uses, model.last_used), default=None)


class Ollama(Rival):
    """Ollama's scheduler (`server/sched.go`: `processPending`, `findRunnerToUnload`).

    At most three models for each GPU, and only where they fit; of those that are idle, the one with the shortest
    keep-alive goes, so that with one keep-alive for all it is any; one that is idle for five minutes goes by itself.
    While one request waits for room, all behind it do.
    """

    name = "ollama"
    queue_blocks = True
    idle_s = 300.0

    def __init__(self, budget_bytes: int, models_max: int = 3, seed: int = 0) -> None:
        super().__init__(budget_bytes)
        self.models_max = models_max
        self._random = Random(seed)

    def has_room(self, model: Loaded) -> bool:
        """By number, and by bytes."""
        fits = self.taken_bytes() + model.nbytes <= self.budget_bytes
        return fits and sum(1 for _ in self.resident()) < self.models_max

    def victim(self, candidates: list[Loaded]) -> Loaded | None:
        """Any, as all have the same keep-alive, and Go visits maps in no order."""
        return self._random.choice(candidates) if candidates else None


class LlamaCpp(Rival):
    """llama.cpp's router with `--models-max` (`tools/server/server-models.cpp`), 4 unless told otherwise.

    It counts models and not bytes, so that one that does not fit fails to load
    (https://github.com/ggml-org/llama.cpp/pull/25326). The one used longest ago goes; since
    https://github.com/ggml-org/llama.cpp/pull/26572 only if it is idle, and requests wait for that.
    """

    name = "llama.cpp"

    def __init__(self, budget_bytes: int, models_max: int = 4) -> None:
        super().__init__(budget_bytes)
        self.models_max = models_max

    def has_room(self, model: Loaded) -> bool:
        """By number alone."""
        return sum(1 for _ in self.resident()) < self.models_max

    def victim(self, candidates: list[Loaded]) -> Loaded | None:
        """The one used longest ago."""
        return min(candidates, key=lambda model: model.last_used, default=None)


class OldLlamaCpp(LlamaCpp):
    """The same before August 2026: who goes may be in use (https://github.com/ggml-org/llama.cpp/pull/23640)."""

    name = "llama.cpp-before-26572"

    def candidates(self) -> list[Loaded]:
        """Those that are loaded, busy or not."""
        return [model for model in self.resident() if model.phase is Phase.AWAKE]


RIVALS: dict[str, type[Rival]] = {kind.name: kind for kind in (Lru, Lfu, Ollama, LlamaCpp, OldLlamaCpp)}
"""The rules by name."""
