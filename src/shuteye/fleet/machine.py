"""A machine that carries out wakes and sleeps, and a fake of one that only computes how long they would take.

The seam is one verb, as a machine answers by events; `FakeMachine` says when they will come. Shipped, so that others
can try schedulers with it.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from shuteye.errors import InternalError, InvalidRequest
from shuteye.fleet.actions import Sleep, Wake
from shuteye.fleet.events import TransitionFailed, TransitionFinished
from shuteye.fleet.model_spec import Depth, ModelSpec


class ModelProfile(msgspec.Struct, frozen=True, kw_only=True):
    """What a model really takes, which its scheduler learns only by measurement.

    Attributes:
        awake_bytes, growth_bytes: right after a wake, and how much more while it runs.
        residual_bytes: at level 1, at level 2 and unloaded.
        wake_s: from each of these.
        sleep_s: to any of them.
        tokens_per_s: of one request, however many run.
        estimated_bytes: what the scheduler is told before it was measured; the truth if None.
    """

    name: str
    awake_bytes: int
    growth_bytes: int = 0
    residual_bytes: tuple[int, int, int] = (0, 0, 0)
    wake_s: tuple[float, float, float] = (1.0, 1.0, 1.0)
    sleep_s: float = 0.1
    tokens_per_s: float = 100.0
    estimated_bytes: int | None = None
    pinned: bool = False
    priority: int = 0

    def __post_init__(self) -> None:
        numbers = (self.awake_bytes, self.growth_bytes, *self.residual_bytes, *self.wake_s, self.sleep_s)
        if not all(0 <= number < float("inf") for number in numbers):
            raise InvalidRequest(f"Bytes and seconds of {self.name} must be finite and at least 0.", param="models")
        if not self.tokens_per_s > 0:
            raise InvalidRequest(f"tokens_per_s of {self.name} must be greater than 0.", param="models")

    def bytes_at(self, depth: Depth) -> int:
        """What it takes at `depth`, with all of its growth if awake."""
        return self.awake_bytes + self.growth_bytes if depth is Depth.AWAKE else self.residual_bytes[depth - 1]

    def spec(self) -> ModelSpec:
        """What a scheduler is told of it."""
        awake_bytes = self.awake_bytes if self.estimated_bytes is None else self.estimated_bytes
        level_1, level_2, unloaded = self.residual_bytes
        return ModelSpec(
            name=self.name,
            awake_bytes=awake_bytes,
            growth_bytes=self.growth_bytes,
            level_1_bytes=level_1,
            level_2_bytes=level_2,
            unloaded_bytes=unloaded,
            wake_s=self.wake_s[0],
            pinned=self.pinned,
            priority=self.priority,
        )


class FakeMachine:
    """Memory that is counted and not taken.

    Attributes:
        memory_bytes: a wake fails that would need more; None for no limit.
        resident_bytes: what all models take now; of transitions the larger end.
        peak_bytes: the most that ever was.
    """

    def __init__(self, profiles: Iterable[ModelProfile], memory_bytes: int | None = None) -> None:
        self.profiles = {profile.name: profile for profile in profiles}
        self.memory_bytes = memory_bytes
        self._depths = dict.fromkeys(self.profiles, Depth.UNLOADED)
        self._under_way: dict[str, tuple[Depth, float, str]] = {}
        self.resident_bytes = sum(profile.bytes_at(Depth.UNLOADED) for profile in self.profiles.values())
        self.peak_bytes = self.resident_bytes
        self._failing: set[str] = set()

    def depth(self, model: str) -> Depth:
        """Where a model is; during a transition where that began."""
        return self._depths[model]

    def fail_next(self, model: str) -> None:
        """Have the next transition of a model fail."""
        self._failing.add(model)

    def begin(self, action: Wake | Sleep) -> float:
        """Begin a transition; returns how many seconds it takes."""
        model = action.model
        if model in self._under_way:
            raise InternalError(f"{model} is in transition already.")
        profile, depth = self.profiles[model], self._depths[model]
        target = Depth.AWAKE if isinstance(action, Wake) else action.depth
        if (target is Depth.AWAKE) == (depth is Depth.AWAKE) and target <= depth:
            raise InternalError(f"{model} is at {depth.name} and cannot go to {target.name}.")
        seconds = profile.wake_s[depth - 1] if target is Depth.AWAKE else profile.sleep_s
        more = max(0, profile.bytes_at(target) - profile.bytes_at(depth))
        error = self._error(model, more)
        self._under_way[model] = (target, seconds, error)
        if not error:
            self._take(more)
        return seconds

    def _error(self, model: str, nbytes: int) -> str:
        """Why a transition will fail that takes `nbytes` more; empty if it will not."""
        if self.memory_bytes is not None and nbytes and self.resident_bytes + nbytes > self.memory_bytes:
            return "There is not enough memory."
        injected = model in self._failing
        self._failing.discard(model)
        return "Injected." if injected else ""

    def end(self, model: str) -> TransitionFinished | TransitionFailed:
        """End the transition of a model; returns what to tell of it."""
        target, seconds, error = self._under_way.pop(model)
        if error:
            return TransitionFailed(model, error)
        profile, depth = self.profiles[model], self._depths[model]
        self._depths[model] = target
        self._take(-max(0, profile.bytes_at(depth) - profile.bytes_at(target)))
        resident = profile.awake_bytes if target is Depth.AWAKE else profile.bytes_at(target)
        return TransitionFinished(model, resident, seconds)

    def _take(self, nbytes: int) -> None:
        self.resident_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.resident_bytes)
