"""What all replicas of an application should be: asleep or awake, paused or not; which calls lead there. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from shuteye.calls import Call, PauseCall, ResumeCall, SleepCall, WakeCall
from shuteye.engine.transitions import parse_level, parse_mode, parse_tags
from shuteye.state import TAGS, Tag


@dataclass(frozen=True, slots=True)
class Wanted:
    """The state that calls have asked for since the application was started.

    Attributes:
        asleep: tags that are to be away.
        level: at which the weights are asleep, if they are: 1 or 2.
        dozing: a `sleep(level=0)` is in force: a pause that a wake lifts, as does `resume`.
        paused: the call that asked for the pause in force; None without one.
        revision: how many calls have been carried out; of two, the higher one is the newer.
    """

    asleep: tuple[Tag, ...] = ()
    level: Literal[1, 2] | None = None
    dozing: bool = False
    paused: PauseCall | None = None
    revision: int = 0

    @property
    def is_awake(self) -> bool:
        """True if nothing is to keep requests from running."""
        return not (self.asleep or self.dozing or self.paused)


AWAKE = Wanted()
"""What an application is started as, and what a replica is that has just loaded its model."""


def after(wanted: Wanted, call: Call[Any]) -> Wanted:
    """What is wanted once `call` was carried out; equal to `wanted` but for the revision if it changes nothing of it.

    Raises:
        InvalidRequest: the call has a level, tags or a mode that there is not.
    """
    match call:
        case SleepCall():
            changed = _after_sleep(wanted, call)
        case WakeCall():
            changed = _after_wake(wanted, parse_tags(call.tags))
        case PauseCall():
            parse_mode(call.mode, "abort")  # what None means is for the engine to say
            changed = replace(wanted, paused=call)
        case ResumeCall():
            changed = replace(wanted, paused=None, dozing=False)
        case _:
            return wanted
    return replace(changed, revision=wanted.revision + 1)


def _after_sleep(wanted: Wanted, call: SleepCall) -> Wanted:
    level, tags = parse_level(call.level), parse_tags(call.tags)
    if level == 0:
        return replace(wanted, dozing=True)
    asleep = tuple(tag for tag in TAGS if tag in wanted.asleep or tag in tags)
    if "weights" not in tags:
        return replace(wanted, asleep=asleep)
    return replace(wanted, asleep=asleep, level=2 if level == 2 or wanted.level == 2 else 1)


def _after_wake(wanted: Wanted, tags: tuple[Tag, ...]) -> Wanted:
    asleep = tuple(tag for tag in wanted.asleep if tag not in tags)
    dozing = wanted.dozing and bool(asleep) and asleep == wanted.asleep  # a wake of what is awake lifts nothing
    return replace(wanted, asleep=asleep, level=wanted.level if "weights" in asleep else None, dozing=dozing)


def calls_between(present: Wanted, wanted: Wanted) -> tuple[Call[Any], ...]:
    """The calls that lead from one to the other; none if they differ in nothing but their revision."""
    calls: list[Call[Any]] = []
    if _needs_wake(present, wanted):
        calls.append(WakeCall())
        present = replace(present, asleep=(), level=None, dozing=False)
    if present.paused and not wanted.paused:
        calls.append(ResumeCall())
        present = replace(present, paused=None, dozing=False)
    if wanted.paused and present.paused != wanted.paused:
        calls.append(wanted.paused)
    if wanted.dozing and not present.dozing:
        calls.append(SleepCall(level=0))
    if (present.asleep, present.level) != (wanted.asleep, wanted.level):
        calls.append(SleepCall(level=wanted.level or 1, tags=wanted.asleep))
    return tuple(calls)


def _needs_wake(present: Wanted, wanted: Wanted) -> bool:
    """Whether something must come back first.

    Of a doze and a pause an engine lifts the one only by waking, and lifts the other, or begins a doze, only awake.
    """
    shallower = (present.level or 0) > (wanted.level or 0)
    only_awake = (present.paused and not wanted.paused) or (wanted.dozing and not present.dozing)
    return (
        shallower
        or not set(present.asleep) <= set(wanted.asleep)
        or (present.dozing and not wanted.dozing)
        or bool(present.asleep and only_awake)
    )
