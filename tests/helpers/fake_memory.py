"""The memory of a fake engine: states by the real tables, and reports of made-up bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from shuteye.calls import RpcCall
from shuteye.engine.sleep import plan_sleep, plan_wake
from shuteye.engine.transitions import check_rpc
from shuteye.errors import InvalidRequest, TransitionConflict
from shuteye.state import (
    TAGS,
    EngineState,
    SleepReport,
    Tag,
    TagReport,
    TagResidency,
    TagState,
    UpdateReport,
    WakeReport,
)

NBYTES = {"weights": 1000, "kv_cache": 500}


def where(state: EngineState, tag: Tag) -> TagResidency:
    return next(each.residency for each in state.tags if each.tag == tag)


def moved(state: EngineState, level: int | None = None, **residency: TagResidency) -> EngineState:
    """The state after some tags have moved."""
    now = {tag: residency.get(tag) or where(state, tag) for tag in TAGS}
    asleep = any(each != "resident" for each in now.values())
    return replace(
        state,
        gate="closed" if asleep or state.paused else "open",
        level=level if asleep else None,
        tags=tuple(_tag_state(tag, each) for tag, each in now.items()),
        missing=("lm_head.weight",) if now["weights"] == "blank" else (),
    )


def _tag_state(tag: Tag, residency: TagResidency) -> TagState:
    held = NBYTES[tag] if residency in ("resident", "blank") else 0
    return TagState(tag, residency, "image" if residency == "offloaded" else None, NBYTES[tag], held)


def gated(state: EngineState, *, paused: bool, refusing: bool) -> EngineState:
    """The state after a pause, or after its end."""
    return moved(replace(state, paused=paused, refusing=refusing), state.level)


def slept(state: EngineState, level: int, tags: Sequence[Tag]) -> tuple[EngineState, SleepReport]:
    """The state after a sleep, and its report; raises TransitionConflict."""
    plan = plan_sleep(where(state, "weights"), where(state, "kv_cache"), level=level, tags=tags)
    ends = {"offload": "offloaded", "discard": "discarded"}
    moves = {tag: ends[move] for tag in TAGS if (move := getattr(plan, tag)) != "keep"}
    if not moves:
        return state, SleepReport(changed=False, level=level)
    freed = {tag: NBYTES[tag] if where(state, tag) == "resident" else 0 for tag in moves}
    reports = tuple(TagReport(tag, end, freed_bytes=freed[tag]) for tag, end in moves.items())
    report = SleepReport(True, level, reports, freed_bytes=sum(freed.values()), residual_bytes=77, seconds=0.01)
    return moved(state, level, **moves), report


def woken(state: EngineState, tags: Sequence[Tag]) -> tuple[EngineState, WakeReport]:
    """The state after a wake, and its report; raises TransitionConflict."""
    plan = plan_wake(where(state, "weights"), where(state, "kv_cache"), tags=tags, missing=state.missing)
    moves = {tag: move for tag in TAGS if (move := getattr(plan, tag)) != "keep"}
    if not moves:
        return state, WakeReport(changed=False)
    ends = {tag: "blank" if move == "blank" else "resident" for tag, move in moves.items()}
    state = moved(state, state.level, **ends)
    reports = tuple(TagReport(tag, end, restored_bytes=NBYTES[tag]) for tag, end in ends.items())
    return state, WakeReport(True, reports, sum(NBYTES[tag] for tag in ends), seconds=0.02, missing=state.missing)


def written(state: EngineState, path: str) -> tuple[bytes, UpdateReport]:
    """What an update finds at `path`, and its report; raises as an engine does."""
    if where(state, "weights") not in ("resident", "blank"):
        raise TransitionConflict("The weights are not mapped; wake them first.")
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error}.", param="path") from error
    return content, UpdateReport(updated=1, updated_bytes=len(content))


def told(call: RpcCall) -> object:
    """What a rank answers to a verb that changes nothing; raises as an engine does."""
    check_rpc(call.method, call.args)
    return {"residual_bytes": 77, "verify": {"verified_bytes": 5}}.get(call.method, [])
