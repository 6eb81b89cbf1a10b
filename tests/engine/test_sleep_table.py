"""The transition table by itself: every cell of it, and the gate it implies."""

import itertools

import pytest

from shuteye.engine.sleep import SleepState, plan_sleep, plan_wake
from shuteye.engine.transitions import parse_level, parse_mode, parse_tags
from shuteye.errors import InvalidRequest, TransitionConflict
from shuteye.state import TAGS, SleepPlan, TagState, WakePlan

WEIGHTS = ("resident", "offloaded", "discarded", "blank")
KV = ("resident", "discarded")
TAG_SETS = (("weights",), ("kv_cache",), TAGS)

SLEEP = {  # (weights, level) → move of the weights; None is a conflict
    ("resident", 1): "offload",
    ("resident", 2): "discard",
    ("offloaded", 1): "keep",
    ("offloaded", 2): "discard",
    ("discarded", 1): None,
    ("discarded", 2): "keep",
    ("blank", 1): None,
    ("blank", 2): "discard",
}


@pytest.mark.parametrize(("weights", "kv", "level", "tags"), list(itertools.product(WEIGHTS, KV, (1, 2), TAG_SETS)))
def test_every_sleep_cell(weights, kv, level, tags):
    """Would catch a cell that silently does something else than the table says."""
    move = SLEEP[weights, level] if "weights" in tags else "keep"
    if move is None:
        with pytest.raises(TransitionConflict):
            plan_sleep(weights, kv, level=level, tags=tags)
        return
    kv_move = "discard" if "kv_cache" in tags and kv == "resident" else "keep"
    assert plan_sleep(weights, kv, level=level, tags=tags) == SleepPlan(weights=move, kv_cache=kv_move)


def expected_wake(weights, kv, tags):
    """The wake half of the table, written independently: None is a conflict."""
    full = (weights == "resident" or "weights" in tags) and (kv == "resident" or "kv_cache" in tags)
    wants_kv = "kv_cache" in tags and kv != "resident"
    kv_move = "commit" if wants_kv else "keep"
    match weights:
        case "resident":
            return WakePlan(kv_cache=kv_move)
        case "offloaded":
            return WakePlan(weights="restore" if "weights" in tags else "keep", kv_cache=kv_move)
        case "discarded":
            if "weights" in tags:
                return WakePlan(weights="reload" if full else "blank", kv_cache=kv_move)
            return None if wants_kv else WakePlan()
        case "blank":
            if wants_kv or (full and "weights" in tags):
                return None
            return WakePlan()


@pytest.mark.parametrize(("weights", "kv", "tags"), list(itertools.product(WEIGHTS, KV, TAG_SETS)))
def test_every_wake_cell(weights, kv, tags):
    """Would catch KV waking over unloaded weights, or level 2 waking blank when everything was asked for."""
    expected = expected_wake(weights, kv, tags)
    if expected is None:
        with pytest.raises(TransitionConflict):
            plan_wake(weights, kv, tags=tags)
        return
    assert plan_wake(weights, kv, tags=tags) == expected


def test_a_conflict_names_what_is_missing():
    with pytest.raises(TransitionConflict, match=r"a\.weight, b\.weight"):
        plan_wake("blank", "discarded", tags=("kv_cache",), missing=("a.weight", "b.weight"))


def state(weights="resident", kv="resident", **flags):
    tags = (TagState("weights", weights, None, 1, 1), TagState("kv_cache", kv, None, 1, 1))
    return SleepState(tags=tags, **flags)


@pytest.mark.parametrize(("weights", "kv"), list(itertools.product(WEIGHTS, KV)))
@pytest.mark.parametrize(
    "flags", [{}, {"paused": True}, {"paused_by_sleep": True}, {"draining": True}, {"faulted": "x"}]
)
def test_the_gate_is_open_only_when_everything_allows_it(weights, kv, flags):
    """Would catch a request running on released, unloaded, paused or untrusted memory."""
    now = state(weights, kv, **flags)
    awake = weights == kv == "resident"
    assert now.is_sleeping == (not awake)
    assert (now.gate == "open") == (awake and not flags)
    assert (now.gate == "draining") == (awake and flags == {"draining": True})


@pytest.mark.parametrize(
    ("now", "level"),
    [
        (state(), None),
        (state(paused_by_sleep=True), 0),
        (state(paused=True), None),
        (state(kv="discarded"), 1),
        (state("offloaded", "discarded"), 1),
        (state("discarded", "discarded"), 2),
        (state("blank", "discarded"), 2),
    ],
)
def test_the_level_follows_from_where_the_bytes_are(now, level):
    assert now.level == level


@pytest.mark.parametrize("level", [-1, 3, True, "1", 1.5])
def test_unknown_levels_are_refused(level):
    with pytest.raises(InvalidRequest) as caught:
        parse_level(level)
    assert caught.value.param == "level"


@pytest.mark.parametrize("tags", [[], ["weight"], ["weights", "kv"], "weights", ()])
def test_unknown_or_empty_tags_are_refused(tags):
    with pytest.raises(InvalidRequest) as caught:
        parse_tags(tags)
    assert caught.value.param == "tags"


def test_tags_come_in_one_order():
    assert parse_tags(["kv_cache", "weights", "kv_cache"]) == TAGS
    assert parse_tags(None) == TAGS


@pytest.mark.parametrize("mode", ["", "drain", "ABORT", 1])
def test_unknown_modes_are_refused(mode):
    with pytest.raises(InvalidRequest) as caught:
        parse_mode(mode, "abort")
    assert caught.value.param == "mode"
