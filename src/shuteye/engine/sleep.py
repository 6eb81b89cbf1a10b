"""Sleep as Gate × TagResidency: one table of legal moves, and the state that they move. Pure.

Knows nothing of ranks: `engine.controller` carries moves out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, get_args

from shuteye.errors import (
    TransitionConflict,
)
from shuteye.state import (
    TAGS,
    EngineState,
    Epoch,
    Gate,
    RankState,
    SleepPlan,
    Tag,
    TagResidency,
    TagState,
    WakePlan,
)

# --- the table ----------------------------------------------------------------------------------

SleepMove = Literal["keep", "offload", "discard"]
WakeMove = Literal["keep", "restore", "reload", "blank"]

SLEEP_WEIGHTS: dict[tuple[TagResidency, int], SleepMove | str] = {
    # (where the weights are, level) → what to do, or why it cannot be done
    ("resident", 1): "offload",
    ("resident", 2): "discard",
    ("offloaded", 1): "keep",
    ("offloaded", 2): "discard",
    ("discarded", 1): "the weights were already discarded at level 2, there is nothing to keep; wake up first",
    ("discarded", 2): "keep",
    ("blank", 1): "the weights have not been loaded since level 2, there is nothing to keep; load them first",
    ("blank", 2): "discard",
}

WAKE_WEIGHTS: dict[tuple[TagResidency, bool], WakeMove | str] = {
    # (where the weights are, whether every sleeping tag is woken) → what to do, or why it cannot be done
    ("resident", True): "keep",
    ("resident", False): "keep",
    ("offloaded", True): "restore",
    ("offloaded", False): "restore",
    ("discarded", True): "reload",
    ("discarded", False): "blank",
    ("blank", True): "the weights are mapped but not loaded",
    ("blank", False): "keep",
}

_SLEEP_MOVES = frozenset(get_args(SleepMove))
_WAKE_MOVES = frozenset(get_args(WakeMove))


def plan_sleep(weights: TagResidency, kv_cache: TagResidency, *, level: int, tags: Sequence[Tag]) -> SleepPlan:
    """The moves that put `tags` to sleep at `level` (1 or 2).

    Raises:
        TransitionConflict: a shallower sleep than the one in force.
    """
    move: SleepMove | str = SLEEP_WEIGHTS[weights, level] if "weights" in tags else "keep"
    if move not in _SLEEP_MOVES:
        raise TransitionConflict(f"Cannot sleep at level {level}: {move}.")
    release_kv = "kv_cache" in tags and kv_cache == "resident"
    return SleepPlan(weights=move, kv_cache="discard" if release_kv else "keep")  # type: ignore[arg-type]


def plan_wake(
    weights: TagResidency, kv_cache: TagResidency, *, tags: Sequence[Tag], missing: Sequence[str] = ()
) -> WakePlan:
    """The moves that wake `tags`.

    Raises:
        TransitionConflict: KV cache is to wake while weights were never loaded; names what is missing.
    """
    sleeping = {tag for tag, where in zip(TAGS, (weights, kv_cache), strict=True) if where != "resident"}
    everything = sleeping <= set(tags)
    move: WakeMove | str = WAKE_WEIGHTS[weights, everything] if "weights" in tags else "keep"
    loaded_after = weights in ("resident", "offloaded") or move == "reload"
    if move not in _WAKE_MOVES or ("kv_cache" in tags and kv_cache != "resident" and not loaded_after):
        raise TransitionConflict(
            f"The weights are {weights} and must be loaded before the KV cache can wake: {_name_some(missing)}. "
            "Use update_weights or reload_weights; or load the image's: sleep at level 2, then wake_up() without tags."
        )
    commit_kv = "kv_cache" in tags and kv_cache != "resident"
    return WakePlan(weights=move, kv_cache="commit" if commit_kv else "keep")  # type: ignore[arg-type]


def _name_some(missing: Sequence[str], limit: int = 5) -> str:
    if not missing:
        return "every tensor is missing"
    more = f" and {len(missing) - limit} more" if len(missing) > limit else ""
    return f"missing {', '.join(missing[:limit])}{more}"


# --- the state ----------------------------------------------------------------------------------


class GateFlags(TypedDict, total=False):
    """What calls change of a `SleepState` beside residency."""

    paused: bool
    refusing: bool
    paused_by_sleep: bool
    draining: bool


@dataclass(frozen=True, slots=True)
class SleepState:
    """Everything the gate depends on; the gate itself is derived.

    Attributes:
        paused: a `pause()` is in force.
        refusing: new requests are refused: one with mode `abort` or `wait` is in force, or on its way.
        paused_by_sleep: a `sleep(level=0)` is in force: a pause that `wake_up` lifts.
        draining: requests in flight are being finished before a transition.
        faulted: why nothing can be served.
        epoch: what the memory of every rank holds.
        ranks: what each of them said last.
    """

    tags: tuple[TagState, ...] = ()
    missing: tuple[str, ...] = ()
    paused: bool = False
    refusing: bool = False
    paused_by_sleep: bool = False
    draining: bool = False
    faulted: str | None = None
    epoch: Epoch = ()
    ranks: tuple[RankState, ...] = ()

    def residency(self, tag: Tag) -> TagResidency:
        """Where a tag's bytes are."""
        return next(state.residency for state in self.tags if state.tag == tag)

    @property
    def is_sleeping(self) -> bool:
        """True until every tag is resident and loaded."""
        return any(state.residency != "resident" for state in self.tags)

    @property
    def gate(self) -> Gate:
        """Whether requests run."""
        if self.faulted or self.paused or self.paused_by_sleep or self.is_sleeping:
            return "closed"
        return "draining" if self.draining else "open"

    @property
    def level(self) -> int | None:
        """The deepest level in force, None when awake."""
        if not self.is_sleeping:
            return 0 if self.paused_by_sleep else None
        return 2 if self.residency("weights") in ("discarded", "blank") else 1

    def snapshot(self, transition: str | None) -> EngineState:
        """What is pushed to whoever admits requests."""
        return EngineState(
            gate=self.gate,
            paused=self.paused or self.paused_by_sleep,
            level=self.level,
            tags=self.tags,
            missing=self.missing,
            faulted=self.faulted,
            transition=transition,
            refusing=self.refusing,
            ranks=self.ranks,
        )
